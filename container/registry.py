"""A client of registries: what of the OCI distribution protocol sending and checking an image takes.

    registry = Registry(Reference.parse("docker.io/me/avatar-api:v1.0"))
    registry.has(digest)
    registry.upload(content, report)      # POST, PATCH after PATCH, PUT; on from where the registry is after a cut
    registry.put_manifest("v1.0", manifest, media_type)

A token may end at any time: a 401 fetches the next one. What may pass (429, 5xx, a lost connection) is tried again, as
long as bytes arrive in between; everything else is an ImageError with its cure.
"""

import email.utils
import ipaddress
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from container.content import Content, sha256_of
from container.credentials import HUB, find_credentials
from container.errors import ImageError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFESTS = (
    MANIFEST,
    INDEX,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
TIMEOUT = httpx2.Timeout(30, read=600, write=120)  # seconds; a registry may read a whole layer before it answers PUT
TOKEN_SECONDS = 60  # a token's life where the server does not say
TOKENS = 5  # new ones for one request: each may end on its way

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may pass
RETRIES = 7  # in a row, without progress
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between them, doubling, unless the registry says how long

Report = Callable[[int], object]
"""Called with how many bytes of a content the registry has; raises where the work is to stop."""


@dataclass(frozen=True)
class Reference:
    """HOST/REPOSITORY:TAG; without a host it is Docker Hub's."""

    host: str
    repository: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> "Reference":
        match = re.fullmatch(
            r"(?:(?P<host>localhost(?::\d+)?|[^/]+[.:][^/]*)/)?"
            r"(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
            r"(?::(?P<tag>\w[\w.-]{0,127}))?",
            text,
        )
        if match is None:
            raise ImageError(
                f"{text!r} is no image's name: it is [HOST/]REPOSITORY[:TAG], the repository in lower case, "
                "such as docker.io/me/avatar-api:v1.0."
            )
        host, repository = match["host"] or HUB, match["repository"]
        if host in ("index.docker.io", "registry-1.docker.io"):
            host = HUB
        if host == HUB and "/" not in repository:
            repository = f"library/{repository}"
        return cls(host, repository, match["tag"] or "latest")

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}:{self.tag}"

    @property
    def url(self) -> str:
        """Plain HTTP only to this machine."""
        name = self.host.rpartition(":")[0] or self.host
        try:
            here = ipaddress.ip_address(name.strip("[]")).is_loopback
        except ValueError:
            here = name == "localhost"
        return f"{'http' if here else 'https'}://{'registry-1.docker.io' if self.host == HUB else self.host}"


@dataclass(frozen=True)
class Manifest:
    content: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return sha256_of(self.content)

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.content)
        return value


class TransientError(Exception):
    """What may pass: try again, after `wait` seconds if the registry says so."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Patience:
    """Waits before each further attempt, and gives up after too many without progress in between."""

    def __init__(self, what: str) -> None:
        self._what, self._failures = what, 0

    def progress(self) -> None:
        self._failures = 0

    def wait(self, error: TransientError) -> None:
        self._failures += 1
        if self._failures > RETRIES:
            raise ImageError(
                f"{self._what}: {error}, after {RETRIES} retries too. The same command goes on from here."
            ) from error
        usual = min(FIRST_WAIT * 2 ** (self._failures - 1), LONGEST_WAIT) * random.uniform(0.8, 1.2)  # noqa: S311
        time.sleep(usual if error.wait is None else min(error.wait, 10 * LONGEST_WAIT))


class Registry:
    """One repository of a registry. May be used by several threads."""

    def __init__(self, reference: Reference, actions: str = "pull,push") -> None:
        self.reference, self._actions = reference, actions
        self._base = f"{reference.url}/v2/{reference.repository}"
        self._credentials = find_credentials(reference.host)
        self._token, self._token_ends, self._scheme = "", 0.0, ""
        self._challenge: dict[str, str] = {}
        self._smallest_chunk = 0
        self._authenticating = threading.Lock()
        self._client = httpx2.Client(timeout=TIMEOUT)

    def close(self) -> None:
        self._client.close()

    # What is there.

    def has(self, digest: str) -> bool:
        answer = self._insist("HEAD", f"{self._base}/blobs/{digest}", (200, 404))
        return answer.status_code == 200

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of a tag or a digest."""
        headers = {"Accept": ", ".join(MANIFESTS)}
        answer = self._insist("GET", f"{self._base}/manifests/{name}", (200, 404), headers=headers)
        if answer.status_code == 404:
            return None
        return Manifest(answer.content, answer.headers.get("Content-Type", "").split(";")[0])

    def blob(self, digest: str, start: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `start` on; goes on where a connection is cut."""
        patience, position = Patience(f"reading {digest}"), start
        while True:
            try:
                headers = {"Range": f"bytes={position}-", "Accept-Encoding": "identity"}
                with self._request("GET", f"{self._base}/blobs/{digest}", headers=headers) as answer:
                    if answer.status_code not in (200, 206):
                        self._refuse(answer, f"reading {digest}")
                    skip = position if answer.status_code == 200 else 0  # the whole, whatever was asked for
                    for block in answer.iter_raw():
                        if skip < len(block):
                            position += len(block) - skip
                            patience.progress()
                            yield block[skip:]
                        skip = max(0, skip - len(block))
                    return
            except TransientError as error:
                patience.wait(error)

    # Sending.

    def check_push(self) -> None:
        """Begin an upload and give it up: whether we may push is known only then."""
        answer = self._insist("POST", f"{self._base}/blobs/uploads/", (202,), content=b"")
        with self._request("DELETE", self._location(answer)):
            pass

    def upload(
        self, content: Content, report: Report, begun: str = "", begin: Callable[[str], object] = lambda _: None
    ) -> str:
        """Send a content, and return its digest.

        `begun`: where an earlier process was sending it to; `begin` is told where this one does.
        Raises PassedError if a stream would have to be opened anew.
        """
        location, position = begun, 0
        patience = Patience(f"sending {content}")
        if begun:
            location, position = self._resume(begun)
        while True:
            try:
                if not location:
                    position = 0
                    report(0)
                    answer = self._insist("POST", f"{self._base}/blobs/uploads/", (202,), content=b"")
                    location = self._location(answer)
                    self._smallest_chunk = int(answer.headers.get("OCI-Chunk-Min-Length") or 0)
                while position < content.size:
                    begin(location)
                    end = min(position + max(content.chunk, self._smallest_chunk), content.size)
                    location, position = self._send_chunk(content, location, position, end, report)
                    patience.progress()
                begin(location)
                self._complete(location, content)
                report(content.size)
                return content.digest
            except TransientError as error:
                patience.wait(error)
                if position == content.size and self.has(content.digest):  # only the answer was lost
                    report(content.size)
                    return content.digest
                location, position = self._resume(location) if location else ("", 0)

    def _send_chunk(self, content: Content, location: str, start: int, end: int, report: Report) -> tuple[str, int]:
        """One PATCH. Returns where the next one goes to, and how far the registry is."""

        def blocks() -> Iterator[memoryview]:
            position = start
            for block in content.blocks(start, end):
                yield block
                position += len(block)
                report(position)

        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(end - start),
            "Content-Range": f"{start}-{end - 1}",
        }
        with self._request("PATCH", location, blocks, headers=headers) as answer:
            if answer.status_code in (404, 416):
                raise TransientError("the registry has lost the upload")
            if answer.status_code not in (201, 202, 204):
                self._refuse(answer, f"sending {content}")
            return self._location(answer), received(answer, end)

    def _complete(self, location: str, content: Content) -> None:
        url = httpx2.URL(location).copy_merge_params({"digest": content.digest})
        with self._request("PUT", str(url), headers={"Content-Length": "0"}) as answer:
            if answer.status_code in (404, 416):
                raise TransientError("the registry has lost the upload")
            if answer.status_code not in (201, 204):
                self._refuse(answer, f"sending {content}")

    def _resume(self, location: str) -> tuple[str, int]:
        """Where an upload goes on and how far the registry is; ("", 0) if it has to begin anew."""
        try:
            answer = self._insist("GET", location, (204, 202, 200, 400, 404, 405, 416))
        except ImageError:
            return "", 0
        if answer.status_code >= 300:
            return "", 0
        return self._location(answer), received(answer, 0)

    def put_manifest(self, name: str, content: bytes, media_type: str) -> None:
        headers = {"Content-Type": media_type}
        self._insist("PUT", f"{self._base}/manifests/{name}", (201, 200, 202), headers=headers, content=content)

    # One request.

    def _insist(self, method: str, url: str, expected: Iterable[int], **options: Any) -> httpx2.Response:
        """The answer to a small request, one of the `expected` statuses."""
        what = f"{method} {httpx2.URL(url).path}"
        patience = Patience(what)
        while True:
            try:
                with self._request(method, url, **options) as answer:
                    if answer.status_code not in expected:
                        self._refuse(answer, what)
                    answer.read()
                    return answer
            except TransientError as error:
                patience.wait(error)

    @contextmanager
    def _request(
        self, method: str, url: str, blocks: Callable[[], Iterator[memoryview]] | None = None, **options: Any
    ) -> Iterator[httpx2.Response]:
        """One answer, with a token that it has accepted. Raises TransientError for what may pass."""
        headers = options.pop("headers", {})
        try:
            for attempt in range(TOKENS + 1):
                if blocks is not None:
                    options["content"] = blocks()
                token = self._authorization(url)
                options["headers"] = headers | ({"Authorization": token} if token else {})
                with self._client.stream(method, url, follow_redirects=method in ("GET", "HEAD"), **options) as answer:
                    if answer.status_code == 401 and attempt < TOKENS and self._may_try(answer, token):
                        continue
                    if answer.status_code in TRANSIENT:
                        answer.read()
                        if "no space left" in answer.text or '"Err":28' in answer.text:
                            raise ImageError(f"The disk of {self.reference.host} is full: make room there.")
                        raise TransientError(f"the registry answers {answer.status_code}", retry_after(answer))
                    yield answer
                    return
        except httpx2.HTTPError as error:
            raise TransientError(first_line(error)) from error

    def _location(self, answer: httpx2.Response) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise ImageError(f"{self.reference.host} does not say where to send to: is it a registry?")
        return str(answer.url.join(location))

    def _refuse(self, answer: httpx2.Response, what: str) -> None:
        answer.read()
        raise ImageError(refusal(self.reference, answer, what, self._credentials is not None))

    # Tokens.

    def _authorization(self, url: str) -> str:
        """What to show to the registry; nothing to other hosts, such as a store that it sends us to."""
        if httpx2.URL(url).netloc != httpx2.URL(self._base).netloc:
            return ""
        with self._authenticating:
            if self._scheme == "bearer" and time.monotonic() > self._token_ends:
                self._fetch_token()
            return self._token

    def _may_try(self, answer: httpx2.Response, shown: str) -> bool:
        """After a 401: get what the registry asks for. False if there is nothing else to show."""
        scheme, challenge = read_challenge(answer.headers.get("WWW-Authenticate", ""))
        with self._authenticating:
            if self._token != shown:  # another thread has been here
                return True
            self._scheme, self._challenge = scheme, challenge
            if scheme == "bearer" and not (shown and challenge.get("error") == "insufficient_scope"):
                self._fetch_token()
                return True
            if scheme == "basic" and self._credentials is not None and not shown:
                self._token = self._credentials.basic
                return True
            return False

    def _fetch_token(self) -> None:
        asked = {"service": self._challenge.get("service", ""), "scope": self._scope}
        who, patience = self._credentials, Patience(f"a token for {self.reference.host}")
        realm = self._challenge.get("realm", "")
        if who is not None and self.reference.url.startswith("https:") and not realm.startswith("https:"):
            raise ImageError(f"{self.reference.host} wants your password sent to {realm!r}, for all to read: do not.")
        while True:
            try:
                started = time.monotonic()
                if who is not None and who.token:
                    grant = {"grant_type": "refresh_token", "refresh_token": who.token, "client_id": "avatar-api"}
                    answer = self._client.post(realm, data=asked | grant)
                else:
                    headers = {"Authorization": who.basic} if who is not None else {}
                    answer = self._client.get(realm, params=asked, headers=headers)
                if answer.status_code in TRANSIENT:
                    raise TransientError(f"{httpx2.URL(realm).host} answers {answer.status_code}", retry_after(answer))
                break
            except httpx2.HTTPError as error:
                patience.wait(TransientError(first_line(error)))
            except TransientError as error:
                patience.wait(error)
        if answer.status_code != 200:
            raise ImageError(refusal(self.reference, answer, "logging in", who is not None))
        given = answer.json()
        self._token = f"Bearer {given.get('token') or given.get('access_token')}"
        life = float(given.get("expires_in") or TOKEN_SECONDS)
        self._token_ends = started + 0.9 * life  # a 401 in the middle of a chunk costs the chunk

    @property
    def _scope(self) -> str:
        return f"repository:{self.reference.repository}:{self._actions}"


def received(answer: httpx2.Response, otherwise: int) -> int:
    """How many bytes of an upload the registry has, by its Range header, in which none is 0-0."""
    match = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
    return otherwise if match is None else int(match[1]) + 1 if int(match[1]) else 0


def read_challenge(header: str) -> tuple[str, dict[str, str]]:
    """WWW-Authenticate's scheme, in lower case, and its parameters."""
    scheme, _, rest = header.partition(" ")
    return scheme.lower(), dict(re.findall(r'(\w+)="([^"]*)"', rest))


def retry_after(answer: httpx2.Response) -> float | None:
    text = answer.headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def refusal(reference: Reference, answer: httpx2.Response, what: str, logged_in: bool) -> str:
    """What a registry's refusal means, and what to do."""
    try:
        errors = answer.json()["errors"]
        code, said = str(errors[0].get("code", "")), str(errors[0].get("message", ""))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        code, said = "", ""
    host, repository = reference.host, f"{reference.host}/{reference.repository}"
    said = f" ({said})" if said else ""
    login = f"docker login {host}" if host != HUB else "docker login"
    challenge = read_challenge(answer.headers.get("WWW-Authenticate", ""))[1]
    denied = challenge.get("error") == "insufficient_scope" or answer.status_code == 403 or code == "DENIED"
    if answer.status_code == 401 and not logged_in:
        return f"You are not logged in to {host}: {login}"
    if answer.status_code == 401 and not denied:
        return f"{host} does not accept your login{said}: {login} again; a token needs read and write permission."
    if answer.status_code in (402, 403) and re.search("quota|limit|storage|billing", said, re.I):
        return f"{host} refuses {what}{said}: the quota is used up; make room or take a larger plan."
    if denied:
        return (
            f"{host} denies pushing to {repository}{said}: create the repository there, log in as somebody who may "
            f"push to it ({login}), and see that the plan allows an image of this size."
        )
    if answer.status_code == 413 or code == "SIZE_INVALID":
        return f"{host} refuses {what}: too large for it{said}; take another registry, such as Docker Hub."
    if answer.status_code == 404:
        return f"{host} has no {repository}{said}: create the repository there, or correct the name."
    if code == "DIGEST_INVALID":
        return f"{host} has not received what was sent{said}: was a file changed? Run the same command again."
    return f"{host}: {what}: status {answer.status_code}{said}"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
