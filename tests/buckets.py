"""An S3 server to test on: moto's, in a process of its own, behind a gate that is as strict as Amazon.

moto takes any signature, and links for ever; the gate does not. It can also be told to misbehave.
A test file imports the two fixtures from here.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

import boto3
import httpx
import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

KEY, SECRET = "AKIAAVATARTEST", "the-secret-of-the-tests"
READER, READER_SECRET = "AKIAREADER", "may-only-read"
SECRETS = {KEY: SECRET, READER: READER_SECRET}

Environ = dict[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], Any]


@dataclass
class Mood:
    """How the server behaves; nothing of it is set at first."""

    ahead: float = 0
    """Seconds that its clock is ahead of the true time."""
    busy: int = 0
    """How many requests it will refuse because it has too much to do."""
    cut: int = 0
    """How many downloads it will break off after `enough` bytes."""
    hold: bool = False
    """Downloads come to a halt after `enough` bytes, and uploads before their end, until this is set back."""
    enough: int = 300_000
    requests: int = 0
    """How many have come so far."""
    downloads: int = 0


@dataclass
class Gate:
    """Refuses what Amazon would refuse, and passes the rest on to `application`."""

    application: Callable[[Environ, StartResponse], Iterable[bytes]]
    mood: Mood = field(default_factory=Mood)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, environ: Environ, start: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/mood":
            with self.changed:
                self.mood.__dict__.update(json.loads(_body(environ)))
                self.changed.notify_all()
                start("200 OK", [])
                return [json.dumps(self.mood.__dict__).encode()]
        self.mood.requests += 1
        if code := self.refusal(environ):
            _body(environ)
            start("503 Slow Down" if code == "SlowDown" else "403 Forbidden", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>Refused: {code}</Message></Error>".encode()]
        if environ["REQUEST_METHOD"] == "PUT":
            self.wait()
        answer = self.application(environ, start)
        if environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"].count("/") < 2:
            return answer
        self.mood.downloads += 1
        return self.misbehave(answer)

    def misbehave(self, answer: Iterable[bytes]) -> Iterator[bytes]:
        content = b"".join(answer)
        yield content[: self.mood.enough]
        if self.mood.cut:
            self.mood.cut -= 1
            raise ConnectionError("cut")
        self.wait()
        yield content[self.mood.enough :]

    def wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.mood.hold)

    def refusal(self, environ: Environ) -> str | None:
        """S3's code for what is wrong with a request."""
        if self.mood.busy:
            self.mood.busy -= 1
            return "SlowDown"
        query = dict(parse_qsl(environ["QUERY_STRING"]))
        if authorization := environ.get("HTTP_AUTHORIZATION"):
            parts = dict(part.split("=", 1) for part in authorization.split(" ", 1)[1].split(", "))
            credential, names, signature = parts["Credential"], parts["SignedHeaders"], parts["Signature"]
            date, lifetime = environ["HTTP_X_AMZ_DATE"], None
        elif "X-Amz-Signature" in query:
            credential, names = query["X-Amz-Credential"], query["X-Amz-SignedHeaders"]
            signature, date, lifetime = query["X-Amz-Signature"], query["X-Amz-Date"], int(query["X-Amz-Expires"])
        else:
            return "AccessDenied"
        key, _, region, service, _ = credential.split("/")
        if key not in SECRETS:
            return "InvalidAccessKeyId"
        address = f"http://{environ['HTTP_HOST']}{environ['RAW_URI'].split('&X-Amz-Signature=')[0]}"
        headers = {
            name: environ["CONTENT_TYPE" if name == "content-type" else _variable(name)] for name in names.split(";")
        }
        request = AWSRequest(environ["REQUEST_METHOD"], address, headers)
        request.context["timestamp"] = date
        signer = (S3SigV4Auth if lifetime is None else S3SigV4QueryAuth)(
            Credentials(key, SECRETS[key]), service, region
        )
        if signature != signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request):
            return "SignatureDoesNotMatch"
        signed = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        age = datetime.now(UTC) + timedelta(seconds=self.mood.ahead) - signed
        if lifetime is None and abs(age) > timedelta(minutes=15):
            return "RequestTimeTooSkewed"
        if lifetime is not None and age > timedelta(seconds=lifetime):
            return "AccessDenied"
        return "AccessDenied" if key == READER and environ["REQUEST_METHOD"] != "GET" else None


def _body(environ: Environ) -> bytes:
    return bytes(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))


def _variable(header: str) -> str:
    return f"HTTP_{header.upper().replace('-', '_')}"


@dataclass
class S3Server:
    url: str

    def set(self, **mood: float) -> dict[str, Any]:
        """Change fields of its Mood. Returns them all."""
        return dict(httpx.post(f"{self.url}/mood", json=mood).json())

    @cached_property
    def client(self) -> Any:
        return boto3.client(
            "s3", "us-east-1", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET
        )

    def keys(self, bucket: str) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", ())]


@pytest.fixture(scope="session", name="s3_server")
def s3_server_fixture() -> Iterator[S3Server]:
    environment = {**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "false"}
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        yield S3Server(process.stdout.readline().strip())
        process.kill()


@pytest.fixture(name="s3")
def s3_fixture(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server in a good mood, and the credentials for it; nobody's own are used."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3_server.set(**Mood().__dict__)
    yield s3_server
    s3_server.set(**Mood().__dict__)


def _serve() -> None:
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    WSGIRequestHandler.protocol_version = "HTTP/1.1"
    server = make_server("127.0.0.1", 0, Gate(DomainDispatcherApplication(create_backend_app)), threaded=True)
    print(f"http://127.0.0.1:{server.port}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until the tests end, however they do


if __name__ == "__main__":
    _serve()
