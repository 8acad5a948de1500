"""Who is calling: API keys, and the client that each one stands for.

Keys are kept as hashes and compared in constant time. A client is known by the beginning of its key's hash: that is
what owns jobs, and what logs may show.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from avatar_api.http import refuse
from avatar_api.refusals import Refusal
from avatar_api.secret_files import kept_secret
from avatar_api.settings import ServiceSettings

HEALTH = ("/ping", "/livez", "/readyz", "/healthz")
"""Load balancers ask these, without a key."""

EVERYBODY = "everybody"
"""The client of all requests where authentication is off."""

NO_KEY = "The API key is missing or not known; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."

_CLIENT_DIGITS = 16
_CLIENT = "avatar.client"  # in a request's scope


class Keys:
    """The keys that are accepted; none means that everybody is."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def of(cls, settings: ServiceSettings) -> "Keys":
        """Those of the settings; where there are none, the one in the home folder, made and printed if need be."""
        if settings.auth == "off":
            return cls([])
        given = settings.api_keys.get_secret_value().split(",") if settings.api_keys else []
        if settings.api_keys_file is not None:
            given += settings.api_keys_file.read_text().splitlines()
        keys = [key.strip() for key in given if key.strip()]
        return cls(keys or [_own_key(settings.home / "api_key")])

    def client(self, headers: Headers) -> str | None:
        """Whose request this is; None if it carries no key that is known."""
        if not self._digests:
            return EVERYBODY
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(key)
        known = [hmac.compare_digest(digest, accepted) for accepted in self._digests]  # all of them, always
        return digest[:_CLIENT_DIGITS] if any(known) else None


class Authenticated:
    """Middleware: a request without a valid key gets 401, but for health; `client_of` tells whose it is."""

    def __init__(self, app: ASGIApp, keys: Keys | None = None) -> None:
        """keys: those of the environment's settings, if not given."""
        self.app = app
        self.keys = keys or Keys.of(ServiceSettings())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in HEALTH:
            client = self.keys.client(Headers(scope=scope))
            if client is None:
                answer = refuse(Refusal(401, NO_KEY, "invalid_api_key"))
                answer.headers["WWW-Authenticate"] = "Bearer"
                await answer(scope, receive, send)
                return
            scope[_CLIENT] = client
        await self.app(scope, receive, send)


def client_of(request: Request) -> str:
    """Whose request this is, once it came through `Authenticated`."""
    client: str = request.scope[_CLIENT]
    return client


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _own_key(file: Path) -> str:
    """The key in the home folder; printed where this process is the one that made it."""
    key = f"avatar_{secrets.token_urlsafe(32)}"
    kept = kept_secret(file, key)
    if kept == key:
        print(f"Your API key, made at this first start and kept in {file}:\n\n    {key}\n", flush=True)
    return kept
