"""Real registries on loopback for the tests, and what can stand between them and us: cuts, stalls, tokens, limits."""

import base64
import io
import json
import random
import select
import socket
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from tests.served import free_port

CLOCK_LEEWAY = 60  # seconds that docker-registry lets a token live beyond its end


@contextmanager
def registry(folder: Path, options: str = "") -> Iterator[str]:
    """Debian's docker-registry; gives HOST:PORT. `options`: more of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    host = f"127.0.0.1:{free_port()}"
    config = folder.parent / f"{folder.name}.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{host}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{folder}'}}, delete: {{enabled: true}}}}\n{options}"
    )
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen(["/usr/bin/docker-registry", "serve", config], stdout=log, stderr=log)
        try:
            wait_for(host, process)
            yield host
        finally:
            process.terminate()
            process.wait()


def wait_for(host: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", int(host.rpartition(":")[2]))):
            return
        time.sleep(0.02)
    raise RuntimeError("docker-registry has ended")


class Proxy:
    """Stands between a client and a registry. It counts what is sent, and may cut connections or stop them.

    `cuts`, `cuts_back`: after so many bytes from clients, or to them, the connection that carries them is cut.
    """

    def __init__(self, registry: str) -> None:
        self._registry = registry
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.host = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.cuts: list[int] = []
        self.cuts_back: list[int] = []
        self.cut = 0  # how many were
        self.sent = self.sent_back = 0  # bytes
        self.hold_after: int | None = None  # bytes after which nothing passes any more
        self.holding, self.released = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        host, _, port = self._registry.rpartition(":")
        with client, socket.create_connection((host, int(port))) as server, suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    block = ready.recv(65536)
                    if not block:
                        return
                    passed = self._passed(len(block), ready is client)
                    if self.holding.is_set():
                        self.released.wait()
                        return
                    (server if ready is client else client).sendall(block[:passed])
                    if passed < len(block):
                        return

    def _passed(self, count: int, from_client: bool) -> int:
        """How many of so many bytes pass."""
        with self._lock:
            before = self.sent if from_client else self.sent_back
            cuts = self.cuts if from_client else self.cuts_back
            if from_client:
                self.sent += count
            else:
                self.sent_back += count
            if self.hold_after is not None and self.sent > self.hold_after:
                self.holding.set()
            if not cuts or before + count <= cuts[0]:
                return count
            self.cut += 1
            return max(0, cuts.pop(0) - before)


def random_cuts(seed: int, count: int, size: int) -> list[int]:
    chance = random.Random(seed)  # noqa: S311 - no secret
    return sorted(chance.randrange(size) for _ in range(count))


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def front(
    registry: str, judge: Callable[[str, str, Mapping[str, str]], Answer | None], more: Mapping[str, str] = {}
) -> Iterator[str]:
    """A registry behind a server that may answer in its place: `judge` is asked with method, path and headers.

    `more`: headers that the server adds to every answer.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            own = judge(self.command, self.path, dict(self.headers))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if own is None:
                headers = {name: value for name, value in self.headers.items() if name != "Authorization"}
                url = f"http://{registry}{self.path}"
                request = urllib.request.Request(url, body or None, headers, method=self.command)
                try:
                    with urllib.request.urlopen(request) as found:  # noqa: S310
                        own = found.status, dict(found.headers), found.read()
                except urllib.error.HTTPError as error:
                    own = error.code, dict(error.headers), error.read()
            status, headers, content = own
            self.send_response(status)
            for name, value in {**headers, **more}.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with serve(Handler) as host:
        yield host


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Tokens:
    """A token server, whose tokens docker-registry accepts for `life` seconds, and its certificate's file.

    It says that they live for minutes, so that a client learns of their end from the registry alone.
    """

    def __init__(self, folder: Path, life: float, logins: Mapping[str, str], actions: str = "pull,push") -> None:
        self.life, self.given, self._actions = life, 0, actions
        self._logins = logins
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder(name, name, self._key.public_key(), 1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .sign(self._key, hashes.SHA256())
        )
        self.file = folder / "tokens.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def token(self, scopes: list[str]) -> str:
        now = time.time()
        certificate = base64.b64encode(self._certificate.public_bytes(serialization.Encoding.DER)).decode()
        access = [
            {"type": kind, "name": name, "actions": self._actions.split(",")}
            for kind, name, _ in (scope.split(":") for scope in scopes)
        ]
        end = int(now + self.life - CLOCK_LEEWAY)
        claims = {"iss": "tokens", "sub": "me", "aud": "registry", "exp": end, "nbf": int(now) - 600, "access": access}
        parts = [{"typ": "JWT", "alg": "RS256", "x5c": [certificate]}, claims]
        text = b".".join(encoded(json.dumps(part).encode()) for part in parts)
        signature = self._key.sign(text, padding.PKCS1v15(), hashes.SHA256())
        self.given += 1
        return (text + b"." + encoded(signature)).decode()

    @contextmanager
    def registry(self, folder: Path) -> Iterator[str]:
        """A registry that demands them."""
        tokens = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                scheme, _, login = self.headers.get("Authorization", "").partition(" ")
                user, _, password = base64.b64decode(login).decode().partition(":")
                accepted = scheme == "Basic" and tokens._logins.get(user) == password
                scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
                text = json.dumps({"token": tokens.token(scopes), "expires_in": 300}).encode() if accepted else b"{}"
                self.send_response(200 if accepted else 401)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        with ExitStack() as stack:
            realm = f"http://{stack.enter_context(serve(Handler))}/token"
            auth = f"{{realm: '{realm}', service: registry, issuer: tokens, rootcertbundle: '{self.file}'}}"
            yield stack.enter_context(registry(folder, f"auth: {{token: {auth}}}\n"))


def encoded(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


# Code images.


def tar_of(files: Mapping[str, bytes | None]) -> bytes:
    """A layer; None for a directory."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))
    return stream.getvalue()


def write_code_image(file: Path, layers: list[bytes], config: Mapping[str, Any] | None = None) -> str:
    """What `docker save` would write; returns its name for push_image.py."""
    digests = [sha256(layer).hexdigest() for layer in layers]
    described = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/usr/bin"], "Labels": {"org.opencontainers.image.version": "0.1.0"}},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
        "history": [{"created_by": "COPY . ."} for _ in layers],
        **(config or {}),
    }
    names = [f"{digest}.tar" for digest in digests]
    manifest = [{"Config": "config.json", "RepoTags": ["code:latest"], "Layers": names}]
    files = dict(zip(names, layers, strict=True))
    files |= {"config.json": json.dumps(described).encode(), "manifest.json": json.dumps(manifest).encode()}
    file.write_bytes(tar_of(files))
    return f"docker-archive:{file}"
