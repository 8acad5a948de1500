"""The client of registries, against Debian's docker-registry: logins, tokens that end, cuts, limits, full disks."""

import base64
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from container import registry as client
from container.content import BytesContent, Content
from container.credentials import find_credentials
from container.errors import ImageError
from container.registry import Reference, Registry
from tests.conftest import SmallDisk
from tests.image.registries import Answer, Proxy, Tokens, front, random_cuts, registry

BLOB = bytes(range(256)) * 4096  # 1 MiB
SECRET_HASHED = "$2b$04$vbI5EnpgncDUJk9dkk4EL.KVnD7EFLcPmLQZAQJ/rnE8Wab7ZRvuG"  # "secret", as htpasswd -B writes it  # noqa: S105


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small chunks, short waits, and nobody's logins."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(Content, "chunk", 100_000)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry(tmp_path_factory.mktemp("plain") / "registry") as host:
        yield host


def log_in(folder: Path, host: str, user: str, password: str) -> None:
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def send(host: str, name: str = "me/avatar", blob: bytes = BLOB) -> Registry:
    """Upload a blob, and see that it is there as it was."""
    there = Registry(Reference.parse(f"{host}/{name}"))
    content = BytesContent(blob, "blob")
    positions: list[int] = []
    digest = there.upload(content, positions.append)
    assert digest == f"sha256:{sha256(blob).hexdigest()}"
    assert positions[-1] == len(blob)
    assert b"".join(there.blob(digest)) == blob
    return there


@pytest.mark.parametrize(
    ("text", "url", "repository", "tag"),
    [
        ("me/avatar-api:v1.0", "https://registry-1.docker.io", "me/avatar-api", "v1.0"),
        ("docker.io/me/avatar-api", "https://registry-1.docker.io", "me/avatar-api", "latest"),
        ("alpine", "https://registry-1.docker.io", "library/alpine", "latest"),
        ("ghcr.io/me/avatar:1", "https://ghcr.io", "me/avatar", "1"),
        ("localhost:5000/avatar", "http://localhost:5000", "avatar", "latest"),
        ("127.0.0.1:5000/a/b/c:x", "http://127.0.0.1:5000", "a/b/c", "x"),
        ("10.0.0.1:5000/a", "https://10.0.0.1:5000", "a", "latest"),
    ],
)
def test_names_are_read_as_docker_reads_them_and_only_loopback_is_plain_http(
    text: str, url: str, repository: str, tag: str
) -> None:
    reference = Reference.parse(text)
    assert (reference.url, reference.repository, reference.tag) == (url, repository, tag)


@pytest.mark.parametrize("text", ["", "Me/Avatar", "host.de/", "a b", "me/avatar:", "https://docker.io/me/avatar"])
def test_what_is_no_name_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ImageError, match=r"is no image's name.*docker\.io/me/avatar-api:v1\.0"):
        Reference.parse(text)


def test_a_blob_arrives_in_chunks_and_is_known_afterwards(plain: str) -> None:
    there = send(plain, "chunks")
    assert there.has(f"sha256:{sha256(BLOB).hexdigest()}")
    assert not there.has(f"sha256:{'0' * 64}")
    assert there.manifest("latest") is None


@pytest.mark.parametrize("seed", range(20))
def test_a_connection_that_is_cut_at_random_points_changes_nothing_about_the_result(plain: str, seed: int) -> None:
    with Proxy(plain) as proxy:
        proxy.cuts = random_cuts(seed, 3, len(BLOB))
        send(proxy.host, f"cut-{seed}")
        assert proxy.cut == 3


def test_an_upload_that_another_process_has_begun_goes_on_where_it_was(plain: str) -> None:
    """Ended between two chunks, where docker-registry can go on; the bytes before are read, and not sent again."""
    places: list[str] = []

    def begin(location: str) -> None:
        places.append(location)
        if len(places) == 6:  # five chunks have arrived
            raise KeyboardInterrupt

    with Proxy(plain) as proxy:
        with pytest.raises(KeyboardInterrupt):
            there = Registry(Reference.parse(f"{proxy.host}/resumed"))
            there.upload(BytesContent(BLOB, "blob"), lambda _: None, begin=begin)
        sent = proxy.sent
        other = Registry(Reference.parse(f"{proxy.host}/resumed"))
        digest = other.upload(BytesContent(BLOB, "blob"), lambda _: None, places[-1])
        assert b"".join(other.blob(digest)) == BLOB
        assert len(BLOB) - 500_000 <= proxy.sent - sent < len(BLOB) - 450_000


def test_tokens_that_live_two_seconds_are_replaced_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path, 2, {"me": "secret"})
    with tokens.registry(tmp_path / "registry") as host:
        log_in(tmp_path, host, "me", "secret")
        there = Registry(Reference.parse(f"{host}/me/avatar"))
        digest = there.upload(BytesContent(BLOB, "blob"), lambda _: time.sleep(0.5))  # eleven times
        assert tokens.given > 2
        assert b"".join(there.blob(digest)) == BLOB


def test_a_login_that_may_only_read_is_told_what_it_lacks(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path, 60, {"me": "secret"}, actions="pull")
    with tokens.registry(tmp_path / "registry") as host:
        log_in(tmp_path, host, "me", "secret")
        with pytest.raises(ImageError, match=rf"{host} denies pushing to {host}/me/avatar.*docker login {host}"):
            send(host)
        assert tokens.given < 5


@pytest.mark.parametrize("kind", ["token", "basic"])
def test_who_has_not_logged_in_or_has_a_wrong_password_is_told_to_log_in(tmp_path: Path, kind: str) -> None:
    with demanding(kind, tmp_path) as host:
        with pytest.raises(ImageError, match=f"You are not logged in to {host}: docker login {host}"):
            send(host)
        log_in(tmp_path, host, "me", "wrong")
        with pytest.raises(ImageError, match=f"{host} does not accept your login.*docker login {host} again"):
            send(host)
        log_in(tmp_path, host, "me", "secret")
        send(host)


@contextmanager
def demanding(kind: str, folder: Path) -> Iterator[str]:
    """A registry that knows one login."""
    if kind == "token":
        with Tokens(folder, 60, {"me": "secret"}).registry(folder / "registry") as host:
            yield host
    else:
        (folder / "logins").write_text(f"me:{SECRET_HASHED}\n")
        with registry(folder / "registry", f"auth: {{htpasswd: {{realm: r, path: '{folder / 'logins'}'}}}}\n") as host:
            yield host


@pytest.mark.parametrize("named_by", ["credHelpers", "credsStore"])
def test_a_credential_helper_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str) -> None:
    program = tmp_path / "docker-credential-mine"
    program.write_text('#!/bin/sh\nread host; echo "{\\"Username\\": \\"me\\", \\"Secret\\": \\"secret\\"}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with demanding("basic", tmp_path) as host:
        named = {"credHelpers": {host: "mine"}} if named_by == "credHelpers" else {"credsStore": "mine"}
        (tmp_path / "config.json").write_text(json.dumps(named))
        send(host)


def test_podmans_login_is_read_too(tmp_path: Path) -> None:
    with demanding("basic", tmp_path) as host:
        (tmp_path / "containers").mkdir()
        log_in(tmp_path / "containers", host, "me", "secret")
        (tmp_path / "containers" / "config.json").rename(tmp_path / "containers" / "auth.json")
        send(host)


def test_a_helper_that_is_not_installed_is_named(tmp_path: Path, plain: str) -> None:
    (tmp_path / "config.json").write_text('{"credsStore": "nowhere"}')
    with pytest.raises(ImageError, match="docker-credential-nowhere, which Docker's configuration names"):
        send(plain)


def test_a_registry_that_limits_requests_is_waited_for_as_long_as_it_says(
    plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, waits = set[str](), list[float]()

    def once_each(method: str, path: str, _: Mapping[str, str]) -> Answer | None:
        """Every request is refused once."""
        if (key := f"{method} {path}") in refused:
            return None
        refused.add(key)
        return 429, {"Retry-After": "17"}, b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}'

    monkeypatch.setattr("container.registry.time.sleep", waits.append)
    with front(plain, once_each) as host:
        send(host, "limited")
    assert set(waits) == {17}
    assert len(waits) > 10


def test_a_registry_that_never_recovers_is_given_up(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[float]()
    monkeypatch.setattr("container.registry.time.sleep", waits.append)
    with (
        front(plain, lambda *_: (503, {}, b"")) as host,
        pytest.raises(ImageError, match=r"answers 503, after 7 retries too\. The same command goes on from here"),
    ):
        send(host)
    assert len(waits) == 7
    assert waits == sorted(waits)


def test_a_registry_that_wants_larger_chunks_gets_them(plain: str) -> None:
    sizes = []

    def judge(method: str, path: str, headers: Mapping[str, str]) -> Answer | None:
        if method == "PATCH":
            sizes.append(int(headers["Content-Length"]))
        return None

    with front(plain, judge, {"OCI-Chunk-Min-Length": "300000"}) as host:
        send(host, "larger")
    assert sizes == [300_000, 300_000, 300_000, len(BLOB) - 900_000]


def test_a_full_disk_of_the_registry_is_named(small_disk: SmallDisk) -> None:
    with registry(small_disk.folder / "registry") as host:
        small_disk.fill()
        with pytest.raises(ImageError, match=f"The disk of {host} is full: make room there"):
            send(host)
        small_disk.make_room()
        send(host)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "NAME_UNKNOWN", "repository name not known"), "create the repository there, or correct the name"),
        ((403, "DENIED", "requested access to the resource is denied"), "denies pushing to .*create the repository"),
        ((403, "DENIED", "storage quota exceeded"), "the quota is used up"),
        ((413, "SIZE_INVALID", "blob too large"), "too large for it.*take another registry"),
    ],
)
def test_what_a_registry_refuses_is_told_with_the_cure(plain: str, answer: tuple[int, str, str], message: str) -> None:
    status, code, text = answer
    body = json.dumps({"errors": [{"code": code, "message": text}]}).encode()
    with (
        front(plain, lambda method, *_: (status, {}, body) if method == "POST" else None) as host,
        pytest.raises(ImageError, match=message),
    ):
        send(host)


def test_a_secret_is_in_no_message_and_no_representation(tmp_path: Path) -> None:
    log_in(tmp_path, "registry.example", "me", "very-secret-word")
    found = find_credentials("registry.example")
    assert found is not None
    assert found.password == "very-secret-word"  # noqa: S105
    assert "very-secret-word" not in repr(found)
