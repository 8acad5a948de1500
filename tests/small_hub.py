"""A small Hugging Face hub on 127.0.0.1, as far as importing models needs one, and its troubles.

It serves folders as repositories: information, the list of files in pages, downloads with ETag and ranges and, for
large files, a redirect to a CDN at another address. Tests set the troubles by the end of the path that they befall,
each as often as it is to happen: refusals, bodies that are cut, corrupt or slow. Every request is kept.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import quote, unquote, urlsplit

LARGE = 4096  # bytes: from here on a file is in LFS, known by its sha256 and served by the CDN
PAGE = 5  # files per page of a list


@dataclass(frozen=True)
class Refusal:
    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repository:
    name: str
    files: dict[str, Path]
    commit: str
    older: tuple[str, ...] = ()  # commits that it can give as well, with the same files
    gated: bool = False
    claimed_sizes: dict[str, int] = field(default_factory=dict)  # what the list of files says instead of the truth
    xet_hashes: dict[str, str] = field(default_factory=dict)

    def entry(self, path: str) -> dict[str, object]:
        """A file as the list of files has it."""
        content = self.files[path].read_bytes()
        size = self.claimed_sizes.get(path, len(content))
        entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": git_sha1(content)}
        if len(content) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        if path in self.xet_hashes:
            entry["xetHash"] = self.xet_hashes[path]
        return entry


class SmallHub:
    """`url` is the hub, `cdn_url` the CDN: another address, so that a token must not be sent on."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.token: str | None = None  # the valid one
        self.private = False  # nothing without it
        self.ignores_ranges = False
        self.xet_storage = ""  # the address of a xet content store
        self.bytes_per_second = 0.0  # of each body; 0 for as fast as it goes
        self.refusals: dict[str, list[Refusal]] = {}
        self.cuts: dict[str, list[int]] = {}  # after this many bytes
        self.corrupt: dict[str, list[bool]] = {}

        self.requests: list[Request] = []
        self.sent: list[tuple[str, int, int]] = []  # file, first byte, number of bytes
        self.lock = Lock()
        self._servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def add(self, name: str, folder: Path) -> Repository:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self.repositories[name] = Repository(name, files, git_sha1(name.encode()))
        return self.repositories[name]

    @contextmanager
    def running(self) -> Iterator["SmallHub"]:
        for server in self._servers:
            Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            for server in self._servers:
                server.shutdown()
                server.server_close()

    def bytes_sent(self, path: str = "") -> int:
        """Of the files whose path ends so."""
        with self.lock:
            return sum(count for name, _, count in self.sent if name.endswith(path))

    def take(self, troubles: dict[str, list[Any]], path: str) -> Any:
        """The next trouble of a kind that befalls a path, or None."""
        with self.lock:
            return next((waiting.pop(0) for end, waiting in troubles.items() if path.endswith(end) and waiting), None)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: SmallHub

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked has been killed; that is what some tests do."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with hub.lock:
            hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        segments = [unquote(segment) for segment in urlsplit(self.path).path.strip("/").split("/")]
        if refusal := hub.take(hub.refusals, path):
            self.reply(refusal.status, refusal.headers, {"error": "so the test wants it"})
        elif segments[0] == "cdn":
            self.send_file(hub.repositories["/".join(segments[1:3])], "/".join(segments[3:]), {})
        elif token is not None and token != hub.token:
            self.reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"}, {"error": "401"})
        elif segments == ["api", "whoami-v2"]:
            self.reply(200 if token else 401, {}, {"name": "somebody"})
        elif hub.private and token is None:
            self.reply(401, {"X-Error-Message": "Invalid username or password."}, {"error": "401"})
        else:
            owner, name, *rest = segments[2:] if segments[:2] == ["api", "models"] else segments
            self.answer(f"{owner}/{name}", rest)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, name: str, rest: list[str]) -> None:
        """A request about a repository; `rest` is what comes after its name: what, revision, path."""
        hub = self.server.hub
        repository = hub.repositories.get(name)
        if repository is None:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"})
        if len(rest) > 1 and rest[1] not in ("main", repository.commit, *repository.older):
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"})
        match rest:
            case [] | ["revision", _]:
                self.reply(200, {}, {"id": name, "sha": repository.commit, "siblings": [], "tags": []})
            case ["tree", _]:
                self.send_list(repository)
            case ["xet-read-token", _]:
                expires = int(time.time()) + 3600
                self.reply(200, {}, {"accessToken": "x", "exp": expires, "casUrl": hub.xet_storage})
            case ["resolve", _, *path]:
                self.resolve(repository, "/".join(path))
            case _:
                self.reply(404, {}, {"error": "not found"})
        return None

    def send_list(self, repository: Repository) -> None:
        start = int(urlsplit(self.path).query.partition("cursor=")[2] or 0)
        paths = sorted(repository.files)
        more = f"{self.server.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
        headers = {"Link": f'<{more}>; rel="next"'} if start + PAGE < len(paths) else {}
        self.reply(200, headers, [repository.entry(path) for path in paths[start : start + PAGE]])

    def resolve(self, repository: Repository, path: str) -> None:
        if repository.gated:
            return self.reply(403, {"X-Error-Code": "GatedRepo"}, {"error": "Access is restricted"})
        if path not in repository.files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"})
        content = repository.files[path].read_bytes()
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{git_sha1(content)}"'}
        if len(content) < LARGE:
            return self.send_file(repository, path, headers)
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        headers["X-Linked-Size"] = str(len(content))
        headers["Location"] = f"{self.server.hub.cdn_url}/cdn/{quote(repository.name)}/{quote(path)}"
        return self.reply(302, headers, {})

    def send_file(self, repository: Repository, path: str, headers: dict[str, str]) -> None:
        hub, name = self.server.hub, f"{repository.name}/{path}"
        content, start, status = repository.files[path].read_bytes(), 0, 200
        if "Range" in self.headers and not hub.ignores_ranges:
            start, status = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        self.start_reply(status, headers | {"Content-Length": str(len(body))})
        if self.command == "HEAD":
            return
        if hub.take(hub.corrupt, name):
            body = body[:-1] + bytes([body[-1] ^ 1])
        cut = hub.take(hub.cuts, name)
        self.send_body(name, start, body if cut is None else body[:cut])
        self.close_connection = cut is not None

    def send_body(self, name: str, start: int, body: bytes) -> None:
        hub, sent = self.server.hub, 0
        step = 4096 if hub.bytes_per_second else 2**20
        with hub.lock:
            hub.sent.append((name, start, 0))
            mine = len(hub.sent) - 1
        while sent < len(body):
            self.wfile.write(body[sent : sent + step])
            sent = min(len(body), sent + step)
            with hub.lock:
                hub.sent[mine] = (name, start, sent)
            if hub.bytes_per_second:
                time.sleep(step / hub.bytes_per_second)

    def reply(self, status: int, headers: dict[str, str], content: object) -> None:
        body = json.dumps(content).encode()
        self.start_reply(status, headers | {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start_reply(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Not on the test's screen."""


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
