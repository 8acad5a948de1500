"""Requests to addresses that callers name: files by URL, and webhooks. Only public addresses are reached.

What counts is the address that is connected to, whatever the URL looks like. For each connection a name is resolved
once, every address it has is judged, and the connection goes to one of those; so neither a redirect nor a name server
that changes its answer leads inside. AVATAR_ALLOWED_HOSTS names what may be reached though it is not public.

Nothing takes longer than the limit in all, however slowly it drips, and a file is written as it arrives.
"""

import base64
import binascii
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote_to_bytes

import httpcore2
import httpx2

from avatar_api.settings import ServiceSettings
from infinitetalk.errors import InputError

LONGEST_URL = 8192  # characters; those that storage services sign have up to 2,000
MAX_REDIRECTS = 5
CONNECT_SECONDS = 5.0  # for one of a name's addresses, before the next one is tried
PIECE = 1 << 20  # characters of a data URI that are decoded at once

REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "avatar-api"}

UNICAST = IPv6Network("2000::/3")  # all that is assigned to anybody
SIX_TO_FOUR = IPv6Network("2002::/16")  # a tunnel to an IPv4 address
NAT64 = IPv6Network("64:ff9b::/96")  # how a network without IPv4 sees the IPv4 addresses
PROTOCOLS = IPv4Network("192.0.0.0/24")  # not all of it is private to each Python; Oracle's cloud keeps secrets there
AZURE_HOST = IPv4Address("168.63.129.16")  # looks public; in Azure, it is the virtual machine's host

Address = IPv4Address | IPv6Address


def save(text: str, target: Path, param: str, settings: ServiceSettings) -> None:
    """Write the file that a text stands for, an http(s) URL or a data URI. Raises InputError."""
    text = text.strip()
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        write_data_uri(text, target, param, settings.max_upload_bytes)
    elif scheme.startswith(("http://", "https://")):
        fetch(text, target, param, settings)
    else:
        shown = repr(text if len(text) <= 40 else text[:40] + "…")
        raise InputError(param, f"{param} is {shown}; send the file itself, an http(s) URL, or a data URI.")


def fetch(url: str, target: Path, param: str, settings: ServiceSettings) -> None:
    """Download a file. Raises InputError for all that the caller or the other side does wrong.

    After an error, a part of the file may be there.
    """
    guard = _Guard(AllowedHosts.parse(settings.allowed_hosts), _Clock(settings.fetch_seconds))
    here = check_url(url, param)
    for _ in range(MAX_REDIRECTS + 1):
        with _answer("GET", here, HEADERS, None, param, guard) as answer:
            if answer.status not in REDIRECTS:
                _receive(answer, target, param, here.host, settings.max_upload_bytes)
                return
            here = _redirected(here, answer, param)
    problem = f"redirects more than {MAX_REDIRECTS} times"
    raise InputError(param, f"{param}: the URL {problem}; send the file's own URL.", "too_many_redirects")


def post(url: str, body: bytes, headers: dict[str, str], param: str, settings: ServiceSettings, seconds: float) -> int:
    """The status of the answer to a POST: its body is not read, and redirects are not followed. Raises InputError."""
    guard = _Guard(AllowedHosts.parse(settings.allowed_hosts), _Clock(seconds))
    with _answer("POST", check_url(url, param), HEADERS | headers, body, param, guard) as answer:
        return answer.status


def check_url(url: str, param: str) -> httpx2.URL:
    """Judge a URL's form; where it leads shows when it is connected to. Raises InputError."""
    if len(url) > LONGEST_URL:
        raise InputError(param, f"{param}: the URL has {len(url)} characters; the limit is {LONGEST_URL}.", "too_long")
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InputError(param, f"{param}: the URL cannot be read ({error}); send an http(s) URL.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        wanted = "begin with http:// or https:// and name a host, and at most a port up to 65535"
        raise InputError(param, f"{param}: the URL must {wanted}.")
    if parsed.userinfo:
        problem = "the URL holds a user name or password, which are not sent"
        raise InputError(param, f"{param}: {problem}; send a URL that works without them.")
    return parsed


@dataclass(frozen=True)
class AllowedHosts:
    """What may be reached though it is not public."""

    hosts: frozenset[str]
    networks: tuple[IPv4Network | IPv6Network, ...]

    @classmethod
    def parse(cls, setting: str) -> Self:
        """`files.internal, 10.1.0.0/16`. Raises ValueError for what is neither a host nor a network."""
        hosts, networks = set[str](), list[IPv4Network | IPv6Network]()
        for entry in filter(None, (part.strip() for part in setting.split(","))):
            try:
                networks.append(ip_network(entry))
            except ValueError as error:
                if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", entry):
                    wanted = "hosts like files.internal and networks like 10.1.0.0/16, separated by commas"
                    raise ValueError(f"AVATAR_ALLOWED_HOSTS has {entry!r} ({error}); it takes {wanted}.") from None
                hosts.add(_name(entry))
        return cls(frozenset(hosts), tuple(networks))

    def reach(self, host: str, address: Address) -> bool:
        """May an address that a host has be connected to?"""
        address = _behind(address)
        return _name(host) in self.hosts or any(address in network for network in self.networks) or is_public(address)


def is_public(address: Address) -> bool:
    """Does an address mean the same host to everybody?"""
    address = _behind(address)
    if isinstance(address, IPv6Address):
        return address in UNICAST and address.is_global and address not in SIX_TO_FOUR
    return address.is_global and not address.is_multicast and address not in PROTOCOLS and address != AZURE_HOST


def write_data_uri(uri: str, target: Path, param: str, max_bytes: int) -> None:
    """Write the content of `data:[<media type>][;base64],<data>`; the media type is not looked at. Raises InputError.

    White space in it is left out. After an error, a part of the file may be there.
    """
    comma = uri.find(",", 0, LONGEST_URL)
    if comma < 0:
        wanted = "it has the form data:image/png;base64,iVBORw0KGgo…"
        raise InputError(param, f"{param}: the data URI has no comma before its data; {wanted}.")
    pieces = _percent_decoded(uri, comma + 1)
    if uri[:comma].rpartition(";")[2].strip().lower() == "base64":
        pieces = _base64_decoded(pieces, param)
    written = 0
    with target.open("wb") as file:
        for piece in pieces:
            written += file.write(piece)
            _check_size(written, max_bytes, param, "the data URI")
    if not written:
        raise InputError(param, f"{param}: the data URI holds no data.")


def _name(host: str) -> str:
    return host.lower().removesuffix(".")


def _behind(address: Address) -> Address:
    """The IPv4 address that an IPv6 one only spells differently."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in NAT64:
            return IPv4Address(int(address) % 2**32)
    return address


class _Clock:
    """Until when everything must be done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds. Raises TimeoutException when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore2.TimeoutException
        return left


class _NotAllowedError(Exception):
    """A host has an address that may not be reached."""


class _CertificateError(Exception):
    """A host cannot show that it is the one with this name."""


class _Guard(httpcore2.NetworkBackend):
    """Connects to what may be reached, and to nothing else."""

    def __init__(self, allowed: AllowedHosts, clock: _Clock) -> None:
        self.allowed, self.clock = allowed, clock
        self._network = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = _resolve(host, port, self.clock)
        if not all(self.allowed.reach(host, address) for address in addresses):
            raise _NotAllowedError
        for address in addresses:
            seconds = min(CONNECT_SECONDS, self.clock.left())
            try:
                stream = self._network.connect_tcp(str(address), port, seconds, local_address, socket_options)
                return _TimedStream(stream, self.clock)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        self.clock.left()
        raise httpcore2.ConnectError


class _TimedStream(httpcore2.NetworkStream):
    """A connection on which no single wait goes on beyond the end of all."""

    def __init__(self, stream: httpcore2.NetworkStream, clock: _Clock) -> None:
        self._stream, self._clock = stream, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._clock.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._clock.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            stream = self._stream.start_tls(ssl_context, server_hostname, self._clock.left())
        except httpcore2.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise _CertificateError from error
            raise
        return _TimedStream(stream, self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _resolve(host: str, port: int, clock: _Clock) -> list[Address]:
    """All addresses of a host, a numeric one's own included: the system reads 0177.1 as 127.0.0.1 too."""
    found: Future[list[Address]] = Future()

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.set_result([ip_address(answer[4][0]) for answer in answers])
        except (OSError, ValueError) as error:  # ValueError: no possible name
            found.set_exception(error)

    threading.Thread(target=ask, name="resolver", daemon=True).start()  # the system's resolver knows no time limit
    try:
        return found.result(clock.left())
    except TimeoutError:
        raise httpcore2.TimeoutException from None
    except (OSError, ValueError) as error:
        raise httpcore2.ConnectError from error


@contextmanager
def _answer(
    method: str, url: httpx2.URL, headers: dict[str, str], body: bytes | None, param: str, guard: _Guard
) -> Iterator[httpcore2.Response]:
    """The answer to one request, to be read within the context. Raises InputError, also for what goes wrong there."""
    address = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    pool = httpcore2.ConnectionPool(network_backend=guard)
    try:
        with pool, pool.stream(method, address, headers=list(headers.items()), content=body) as answer:
            yield answer
    except _NotAllowedError:
        problem = f"{url.host} is not a public address, and the server may reach no other"
        raise InputError(param, f"{param}: {problem}; send a URL on the Internet.", "url_not_allowed") from None
    except _CertificateError as error:
        problem = f"{url.host} has no certificate for this name that can be trusted"
        raise InputError(param, f"{param}: {problem}; send a URL on another server.", "url_unreachable") from error
    except httpcore2.TimeoutException as error:
        problem = f"{url.host} took longer than {guard.clock.seconds:g} s, the limit here"
        raise InputError(param, f"{param}: {problem}; use a faster server or a smaller file.", "timeout") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        reached = not isinstance(error, httpcore2.ConnectError)
        problem = f"the answer of {url.host} breaks off or is no HTTP" if reached else f"{url.host} cannot be reached"
        raise InputError(param, f"{param}: {problem}; check the URL, or try again.", "url_unreachable") from error


def _redirected(here: httpx2.URL, answer: httpcore2.Response, param: str) -> httpx2.URL:
    location = _header(answer, b"location")
    try:
        there = check_url(str(here.join(location)), param)
    except (InputError, httpx2.InvalidURL):
        problem = f"{here.host} redirects to something that is no http(s) URL"
        raise InputError(param, f"{param}: {problem}; send the file's own URL.", "url_not_allowed") from None
    if here.scheme == "https" and there.scheme == "http":
        problem = f"{here.host} redirects from https to http"
        raise InputError(param, f"{param}: {problem}; send the file's own URL.", "url_not_allowed")
    return there


def _receive(answer: httpcore2.Response, target: Path, param: str, host: str, max_bytes: int) -> None:
    if answer.status != 200:
        remedy = "send a URL that anybody can download the file from"
        raise InputError(param, f"{param}: {host} answered with status {answer.status}; {remedy}.", "url_status")
    encoding = _header(answer, b"content-encoding").lower()
    if encoding not in ("", "identity"):  # it was asked for none
        problem = f"{host} sends the file with content encoding {encoding[:20]!r}"
        raise InputError(param, f"{param}: {problem}; send a URL that gives it as it is.", "unsupported_format")
    said = _header(answer, b"content-length")
    _check_size(int(said) if said.isdecimal() else 0, max_bytes, param, f"the file at {host}")
    received = 0
    with target.open("wb") as file:
        for piece in answer.iter_stream():
            received += len(piece)
            _check_size(received, max_bytes, param, f"the file at {host}")
            file.write(piece)


def _header(answer: httpcore2.Response, name: bytes) -> str:
    return next((value for key, value in answer.headers if key.lower() == name), b"").decode(errors="replace")


def _check_size(size: int, max_bytes: int, param: str, what: str) -> None:
    if size > max_bytes:
        limit = f"{max_bytes / 2**20:.3g} MiB"
        raise InputError(param, f"{param}: {what} is larger than {limit}; send a smaller one.", "too_large")


def _percent_decoded(text: str, start: int) -> Iterator[bytes]:
    while start < len(text):
        end = start + PIECE
        split = text.rfind("%", end - 2, end)  # %41 stays in one piece
        end = split if split > start else end
        yield unquote_to_bytes(re.sub(r"[\t\r\n]", "", text[start:end]))
        start = end


def _base64_decoded(pieces: Iterable[bytes], param: str) -> Iterator[bytes]:
    """Padding may be missing."""
    rest = b""
    try:
        for piece in pieces:
            rest += b"".join(piece.split())
            whole = max(0, len(rest) - 1) // 4 * 4  # the last four are kept back: only there may be padding
            if b"=" in rest[:whole]:
                raise binascii.Error("data follows the padding")
            yield base64.b64decode(rest[:whole], validate=True)
            rest = rest[whole:]
        digits = rest.rstrip(b"=")
        yield base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except binascii.Error as error:
        raise InputError(param, f"{param}: the data URI's data is not base64 ({error}); encode it again.") from None
