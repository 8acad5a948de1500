"""What the server fetches from addresses that callers name, and what it refuses to: with real servers on loopback.

Loopback is not public, so the tests that want an answer allow it. Every connection that this process tries to make is
noted; a refusal is one only if there was none.
"""

import base64
import re
import socket
import socketserver
import ssl
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from avatar_api.outgoing import AllowedHosts, check_url, fetch, is_public, post, save, write_data_uri
from avatar_api.settings import ServiceSettings
from infinitetalk.errors import InputError

CERTIFICATE = Path(__file__).parent / "files_example.pem"  # of files.example, by itself, until 2126; and its key
CONTENT = bytes(range(256)) * 300
MIB = 2**20

_noted: list[list[Any]] = []  # the address of each connection tried, for whom it concerns


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        for notes in _noted:
            notes.append(arguments[1])


sys.addaudithook(_note)


@pytest.fixture
def connections() -> Iterator[list[Any]]:
    """The addresses that this process connected to, or tried to."""
    notes: list[Any] = []
    _noted.append(notes)
    yield notes
    _noted.remove(notes)


class Names(dict[str, list[list[str]]]):
    """A name server of the test's: for each name its answers, one after the other; the last one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.real = socket.getaddrinfo

    def __call__(self, host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in self:
            return self.real(host, *arguments, **options)
        addresses = self[name].pop(0) if len(self[name]) > 1 else self[name][0]
        return [found for address in addresses for found in self.real(address, *arguments, **options)]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The machine's own name server knows no names that change."""
    made_up = Names()
    monkeypatch.setattr(socket, "getaddrinfo", made_up)
    return made_up


Answer = bytes | Callable[[socket.socket], object]


class Server(socketserver.ThreadingTCPServer):
    """Says to each request what is set for its path, byte by byte as it stands there."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []
        self.sent = 0  # bytes, by `endless`
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def endless(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            self.sent += connection.send(b"x" * 65536)


class _Connection(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        head = b""
        with suppress(OSError):
            while not head.endswith(b"\r\n\r\n"):
                got = self.request.recv(1)
                if not got:
                    return
                head += got
            self.server.requests.append(head.decode())
            answer = self.server.answers[head.split()[1].decode()]
            if callable(answer):
                answer(self.request)
            else:
                self.request.sendall(answer)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        running.shutdown()


def answer(content: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def redirect(url: str, status: str = "302 Found") -> bytes:
    return answer(b"", status, f"Location: {url}")


def settings(allowed_hosts: str = "127.0.0.1", **values: Any) -> ServiceSettings:
    return ServiceSettings(allowed_hosts=allowed_hosts, **values)


def refusal(url: str, folder: Path, settings: ServiceSettings) -> InputError:
    with pytest.raises(InputError) as error:
        fetch(url, folder / "file", "audio", settings)
    assert error.value.param == "audio"
    return error.value


# What is fetched


def test_a_file_is_fetched_as_it_is(server: Server, tmp_path: Path) -> None:
    server.answers["/voice.wav?key=1"] = answer(CONTENT)
    fetch(f"{server.url}/voice.wav?key=1", tmp_path / "file", "audio", settings())
    assert (tmp_path / "file").read_bytes() == CONTENT
    (request,) = server.requests
    assert f"Host: 127.0.0.1:{server.port}\r\n" in request
    assert "Accept-Encoding: identity\r\n" in request


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, tmp_path: Path, status: int) -> None:
    server.answers |= {"/here": redirect("there", f"{status} Moved"), "/there": answer(CONTENT)}
    fetch(f"{server.url}/here", tmp_path / "file", "audio", settings())
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_file_in_chunks_without_a_length_is_fetched(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    fetch(server.url, tmp_path / "file", "audio", settings())
    assert (tmp_path / "file").read_bytes() == b"abcde"


def test_memory_stays_flat(server: Server, tmp_path: Path) -> None:
    def send(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {40 * MIB}\r\n\r\n".encode())
        piece = bytes(65536)
        for _ in range(40 * 16):
            connection.sendall(piece)

    server.answers["/"] = send
    tracemalloc.start()
    fetch(server.url, tmp_path / "file", "audio", settings())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size == 40 * MIB
    assert peak < 4 * MIB


def test_what_the_disk_says_is_no_mistake_of_the_callers(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = answer(CONTENT)
    with pytest.raises(FileNotFoundError):
        fetch(server.url, tmp_path / "no folder" / "file", "audio", settings())


# Where to


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "LOCALHOST",
        "127.1",
        "2130706433",
        "017700000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "１２７.0.0.1",
        "0.0.0.0",  # noqa: S104 - nothing is bound to it
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::]",
        "[2001:0:7f00:1::]",
        "[fe80::1]",
        "[fec0::1]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "[2001:db8::1]",
        "169.254.169.254",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.192",
        "192.0.2.1",
        "198.18.0.1",
        "168.63.129.16",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
    ],
)
def test_what_is_not_public_is_not_even_connected_to(
    server: Server, connections: list[Any], tmp_path: Path, host: str
) -> None:
    error = refusal(f"http://{host}:{server.port}/", tmp_path, settings(""))
    assert error.code in ("url_not_allowed", "invalid_value")
    assert re.search("is not a public address|cannot be read", str(error))
    assert connections == []


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1"])
def test_what_is_public(address: str) -> None:
    assert is_public(ip_address(address))


def test_a_name_that_leads_inside_is_refused_and_its_address_not_told(
    server: Server, names: Names, connections: list[Any], tmp_path: Path
) -> None:
    names["innocent.example"] = [["127.0.0.1"]]
    error = refusal(f"http://innocent.example:{server.port}/", tmp_path, settings(""))
    assert error.code == "url_not_allowed"
    assert "127.0.0.1" not in str(error)
    assert connections == []


def test_of_several_addresses_none_may_lead_inside(
    server: Server, names: Names, connections: list[Any], tmp_path: Path
) -> None:
    names["both.example"] = [["127.0.0.1", "10.0.0.1"]]
    error = refusal(f"http://both.example:{server.port}/", tmp_path, settings("127.0.0.1"))
    assert error.code == "url_not_allowed"
    assert connections == []


def test_a_name_that_changes_its_address_after_it_was_judged_gains_nothing(
    server: Server, names: Names, connections: list[Any], tmp_path: Path
) -> None:
    server.answers |= {"/": answer(CONTENT), "/again": redirect("/")}
    names["rebinding.example"] = [["127.0.0.1"], ["127.0.0.2"]]  # may be reached; may not
    url = f"http://rebinding.example:{server.port}"
    fetch(url, tmp_path / "file", "audio", settings("127.0.0.1"))
    assert connections == [("127.0.0.1", server.port)]

    names["rebinding.example"] = [["127.0.0.1"], ["127.0.0.2"]]
    error = refusal(f"{url}/again", tmp_path, settings("127.0.0.1"))
    assert error.code == "url_not_allowed"
    assert connections == [("127.0.0.1", server.port)] * 2


@pytest.mark.parametrize("inside", ["http://127.0.0.2:{port}/", "//127.0.0.2:{port}/", "http://[::ffff:a9fe:a9fe]/"])
def test_a_redirect_does_not_lead_inside(server: Server, connections: list[Any], tmp_path: Path, inside: str) -> None:
    server.answers["/"] = redirect(inside.format(port=server.port))
    assert refusal(server.url, tmp_path, settings("127.0.0.1")).code == "url_not_allowed"
    assert connections == [("127.0.0.1", server.port)]


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/", "file:///etc/passwd", "http://me:secret@127.0.0.1/", "https://"]
)
def test_a_redirect_leads_to_http_only(server: Server, tmp_path: Path, location: str) -> None:
    server.answers["/"] = redirect(location)
    assert refusal(server.url, tmp_path, settings()).code == "url_not_allowed"
    assert len(server.requests) == 1


def test_redirects_end(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = redirect("/")
    assert refusal(server.url, tmp_path, settings()).code == "too_many_redirects"
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1"),
        ("10.0.0.0/8, 127.0.0.0/8", "http://127.0.0.1"),
        ("127.0.0.1", "http://[::ffff:127.0.0.1]"),
        ("files.internal", "http://Files.Internal"),
        ("other.internal, FILES.internal.", "http://files.internal."),
    ],
)
def test_what_is_allowed_is_reached_though_not_public(
    server: Server, names: Names, tmp_path: Path, allowed: str, url: str
) -> None:
    server.answers["/"] = answer(CONTENT)
    names["files.internal"] = names["files.internal."] = [["127.0.0.1"]]
    fetch(f"{url}:{server.port}/", tmp_path / "file", "audio", settings(allowed))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "10.1.2.3/16", "http://files.internal", "*.internal", "a b"])
def test_a_setting_that_names_no_host_is_an_error(entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(entry))):
        AllowedHosts.parse(f"files.internal,{entry}")


def test_proxies_of_the_environment_are_not_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch, connections: list[Any], tmp_path: Path
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("ALL_PROXY", server.url)
    refusal("http://10.0.0.1/", tmp_path, settings())
    assert connections == []


def test_the_next_address_is_tried_where_one_does_not_answer(
    server: Server, names: Names, connections: list[Any], tmp_path: Path
) -> None:
    server.answers["/"] = answer(CONTENT)
    names["two.example"] = [["127.0.0.3", "127.0.0.1"]]
    fetch(f"http://two.example:{server.port}/", tmp_path / "file", "audio", settings("127.0.0.0/8"))
    assert connections == [("127.0.0.3", server.port), ("127.0.0.1", server.port)]


# Certificates


@pytest.fixture
def secure(names: Names) -> Iterator[Server]:
    """https://files.example, which nobody but SSL_CERT_FILE vouches for."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(CERTIFICATE)
    names["files.example"] = names["other.example"] = [["127.0.0.1"]]
    with Server(tls) as running:
        tls.sni_callback = lambda _, name, __: running.requests.append(f"SNI {name}")
        running.answers["/"] = answer(CONTENT)
        yield running
        running.shutdown()


def test_the_certificate_is_the_names(secure: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    fetch(f"https://files.example:{secure.port}/", tmp_path / "file", "audio", settings())
    assert (tmp_path / "file").read_bytes() == CONTENT
    greeting, request = secure.requests
    assert greeting == "SNI files.example"
    assert f"Host: files.example:{secure.port}\r\n" in request


@pytest.mark.parametrize(("host", "trusted"), [("files.example", False), ("other.example", True), ("127.0.0.1", True)])
def test_another_or_a_self_signed_certificate_is_refused(
    secure: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str, trusted: bool
) -> None:
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    error = refusal(f"https://{host}:{secure.port}/", tmp_path, settings())
    assert error.code == "url_unreachable"
    assert "certificate" in str(error)
    assert not any("GET" in request for request in secure.requests)


def test_from_https_a_redirect_leads_to_https_only(
    secure: Server, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    secure.answers["/"] = redirect(server.url)
    error = refusal(f"https://files.example:{secure.port}/", tmp_path, settings())
    assert error.code == "url_not_allowed"
    assert "from https to http" in str(error)
    assert server.requests == []


# How much, how long, and what it says


def test_an_endless_file_is_cut_off_at_the_limit(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = server.endless
    error = refusal(server.url, tmp_path, settings(max_upload_bytes=2 * MIB, fetch_seconds=5))
    assert error.code == "too_large"
    assert "2 MiB" in str(error)
    assert (tmp_path / "file").stat().st_size <= 2 * MIB


def test_a_file_that_says_it_is_too_large_is_not_read(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: 2097153\r\n\r\n"
    assert refusal(server.url, tmp_path, settings(max_upload_bytes=2 * MIB)).code == "too_large"
    assert not (tmp_path / "file").exists()


def test_a_file_as_large_as_the_limit_is_taken(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = answer(CONTENT)
    fetch(server.url, tmp_path / "file", "audio", settings(max_upload_bytes=len(CONTENT)))
    assert refusal(server.url, tmp_path, settings(max_upload_bytes=len(CONTENT) - 1)).code == "too_large"


def test_a_file_that_breaks_off_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this"
    error = refusal(server.url, tmp_path, settings())
    assert error.code == "url_unreachable"
    assert "breaks off" in str(error)


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"", b""),
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_a_server_that_drips_gets_no_more_time(server: Server, tmp_path: Path, start: bytes, drop: bytes) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(100):
            over.wait(0.02)
            connection.sendall(drop)

    server.answers["/"] = drip
    error = refusal(server.url, tmp_path, settings(fetch_seconds=0.3))
    over.set()
    assert error.code == "timeout"
    assert "0.3 s" in str(error)


def test_all_redirects_share_the_time(server: Server, tmp_path: Path) -> None:
    def slow(connection: socket.socket) -> None:
        over.wait(0.2)
        connection.sendall(redirect("/"))

    over = threading.Event()
    server.answers["/"] = slow
    assert refusal(server.url, tmp_path, settings(fetch_seconds=0.5)).code == "timeout"
    over.set()


def test_a_slow_name_server_gets_no_more_time(
    monkeypatch: pytest.MonkeyPatch, connections: list[Any], tmp_path: Path
) -> None:
    over = threading.Event()

    def slow(*_: Any, **__: Any) -> None:
        over.wait(2)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert refusal("http://slow.example/", tmp_path, settings(fetch_seconds=0.2)).code == "timeout"
    over.set()
    assert connections == []


@pytest.mark.parametrize("status", ["404 Not Found", "401 Unauthorized", "500 Oops", "204 No Content", "304 Same"])
def test_any_other_status_is_told_and_nothing_of_what_comes_with_it(
    server: Server, tmp_path: Path, status: str
) -> None:
    server.answers["/"] = answer(b"" if status[:3] in ("204", "304") else b"an internal secret", status)
    error = refusal(f"{server.url}/", tmp_path, settings())
    assert error.code == "url_status"
    assert status[:3] in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP, identity", "br"])
def test_compressed_files_are_refused(server: Server, tmp_path: Path, encoding: str) -> None:
    server.answers["/"] = answer(CONTENT, "200 OK", f"Content-Encoding: {encoding}")
    assert refusal(server.url, tmp_path, settings()).code == "unsupported_format"


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\x00\xff" * 1000,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 400 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000,
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
)
def test_what_is_no_answer_is_refused(server: Server, tmp_path: Path, noise: bytes) -> None:
    server.answers["/"] = noise
    assert refusal(server.url, tmp_path, settings()).code in ("url_unreachable", "url_status", "too_large")


def test_who_does_not_answer_is_named(server: Server, names: Names, tmp_path: Path) -> None:
    names["nobody.example"] = [["127.0.0.3"]]
    for host in ("nobody.example", "does-not-exist.invalid", "a" * 64 + ".example", "a..example"):
        error = refusal(f"http://{host}:{server.port}/", tmp_path, settings("127.0.0.0/8"))
        assert error.code in ("url_unreachable", "invalid_value")
        assert "127.0.0.3" not in str(error)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://files.example/a", "http:// or https://"),
        ("file:///etc/passwd", "http:// or https://"),
        ("http:///a", "name a host"),
        ("https://", "name a host"),
        ("files.example/a", "http:// or https://"),
        ("http://me:secret@files.example/", "user name or password"),
        ("http://token@files.example/", "user name or password"),
        ("http://files.example:port/", "cannot be read"),
        ("http://files.example:99999/", "up to 65535"),
        ("http://files.example/\n", "cannot be read"),
        ("http://[::1/", "cannot be read"),
        ("http://files.example/" + "a" * 9000, "the limit is 8192"),
    ],
)
def test_urls_that_cannot_be(url: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        check_url(url, "webhook_url")
    assert error.value.param == "webhook_url"
    assert "secret" not in str(error.value)


def test_a_post_tells_the_status_and_follows_nothing(server: Server) -> None:
    bodies: list[bytes] = []

    def receive(connection: socket.socket) -> None:
        bodies.append(connection.recv(5))
        connection.sendall(redirect("http://169.254.169.254/"))

    server.answers["/hook"] = receive
    assert post(f"{server.url}/hook", b"hello", {"webhook-id": "msg_1"}, "webhook_url", settings(), 5) == 302
    assert bodies == [b"hello"]
    (request,) = server.requests
    assert "webhook-id: msg_1\r\n" in request
    assert "Content-Length: 5\r\n" in request


def test_the_body_of_the_answer_to_a_post_is_left_alone(server: Server) -> None:
    server.answers["/"] = server.endless
    assert post(server.url, b"", {}, "webhook_url", settings(), 5) == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "[::1]"])
def test_a_post_does_not_lead_inside_either(connections: list[Any], host: str) -> None:
    with pytest.raises(InputError, match="not a public address"):
        post(f"http://{host}/", b"", {}, "webhook_url", settings(""), 5)
    assert connections == []


# Data URIs


def in_lines(data: bytes) -> str:
    return base64.encodebytes(data).decode()


def decoded(uri: str, folder: Path, max_bytes: int = 100 * MIB) -> bytes:
    write_data_uri(uri, folder / "file", "input_reference", max_bytes)
    return (folder / "file").read_bytes()


BASE64 = base64.b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"DATA:image/png;charset=utf-8;BASE64,{BASE64}",
        f"data:image/png;base64,{in_lines(CONTENT)}",
        f"data:image/png;base64,{quote(BASE64, safe='')}",
        f"data:image/png;base64,  {BASE64}\r\n",
        f"data:image/png,{quote(CONTENT)}",
        f"data:,{quote(CONTENT, safe='')}",
    ],
)
def test_data_uris_are_decoded(tmp_path: Path, uri: str) -> None:
    assert decoded(uri, tmp_path) == CONTENT


@pytest.mark.parametrize("length", range(7))
@pytest.mark.parametrize("padded", [True, False])
def test_pieces_and_padding_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, padded: bool
) -> None:
    content = CONTENT[250 : 257 + length]
    text = base64.b64encode(content).decode()
    for piece in range(3, 12):
        monkeypatch.setattr("avatar_api.outgoing.PIECE", piece)
        assert decoded(f"data:;base64,{text if padded else text.rstrip('=')}", tmp_path) == content
        assert decoded(f"data:;base64,{quote(in_lines(content))}", tmp_path) == content
        assert decoded(f"data:,{quote(content)}", tmp_path) == content


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "no data"),
        ("data:,", "no data"),
        ("data:;base64,a*b*", "not base64"),
        ("data:;base64,****aaaaaaaa", "not base64"),
        ("data:;base64,aaaaa", "not base64"),
        ("data:;base64,aa==aaaa", "not base64"),
        ("data:;base64,aaa=a", "not base64"),
        ("data:;base64,äöüß", "not base64"),
    ],
)
def test_data_uris_that_cannot_be(tmp_path: Path, uri: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        decoded(uri, tmp_path)
    assert error.value.param == "input_reference"


@pytest.mark.parametrize("uri", [f"data:;base64,{BASE64}", f"data:,{quote(CONTENT)}"])
def test_data_uris_have_the_limit_of_files(tmp_path: Path, uri: str) -> None:
    assert decoded(uri, tmp_path, len(CONTENT)) == CONTENT
    with pytest.raises(InputError) as error:
        decoded(uri, tmp_path, len(CONTENT) - 1)
    assert error.value.code == "too_large"


def test_a_large_data_uri_is_decoded_in_pieces(tmp_path: Path) -> None:
    uri = "data:;base64," + "QUJD" * (8 * MIB)
    tracemalloc.start()
    write_data_uri(uri, tmp_path / "file", "audio", 100 * MIB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size == 24 * MIB
    assert peak < 8 * MIB


# Which of them


def test_a_text_is_a_url_or_a_data_uri(server: Server, tmp_path: Path) -> None:
    server.answers["/"] = answer(CONTENT)
    for text in (server.url, f" {server.url.upper()}\n", f"data:;base64,{BASE64}", f"\nData:,{quote(CONTENT)}"):
        save(text, tmp_path / "file", "audio", settings())
        assert (tmp_path / "file").read_bytes() == CONTENT
        (tmp_path / "file").unlink()


@pytest.mark.parametrize("text", ["", "voice.wav", "/etc/passwd", "file:///etc/passwd", "ftp://a/b", BASE64])
def test_any_other_text_is_refused_and_says_what_is_possible(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"send the file itself, an http\(s\) URL, or a data URI") as error:
        save(text, tmp_path / "file", "audio", settings())
    assert len(str(error.value)) < 150
    assert not (tmp_path / "file").exists()
