"""The HTTP around the Bento's own: health, one shape for every error, a limit on what is sent, headers for browsers.

An error is always `{"error": {"type", "code", "message", "param"}}`; BentoML's own answers are brought into that shape.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from itertools import chain
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avatar_api import metrics
from avatar_api.refusals import REFUSABLE, Refusal, refusal

PAGES = ("text/html", "text/css", "text/javascript", "application/javascript")


def refuse(refused: Refusal) -> JSONResponse:
    metrics.ERRORS.labels(refused.code).inc()
    answer = JSONResponse({"error": refused.error}, refused.status)
    if refused.retry_seconds is not None:
        answer.headers["Retry-After"] = str(refused.retry_seconds)
    return answer


def create_app(ready: Callable[[], Any], routers: Sequence[APIRouter]) -> FastAPI:
    """ready: an async function that says whether the models are loaded."""
    app = FastAPI(title="Avatar API", version="1", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    for router in routers:
        app.include_router(router)

    add_health(app, ready)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        said = first["msg"][0].lower() + first["msg"][1:]
        message = f"{param} is {str(first.get('input'))[:60]!r}; {said.replace('input should', 'it should')}."
        return refuse(Refusal(422, message, "invalid_value", param))

    for kind in REFUSABLE:

        @app.exception_handler(kind)
        async def refused(request: Request, error: Exception) -> JSONResponse:
            return refuse(refusal(error))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        path = request.url.path
        message = f"{request.method} {path}: {status.phrase}."
        answer = refuse(Refusal(status, message, status.name.lower()))
        if status == HTTPStatus.METHOD_NOT_ALLOWED:  # Starlette's own answer knows one route only
            every = chain(app.routes, *(router.routes for router in routers))
            routes = [route for route in every if isinstance(route, Route)]
            methods = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
            answer.headers["Allow"] = ", ".join(sorted(methods))
        return answer

    return app


def add_health(app: FastAPI, ready: Callable[[], Any]) -> None:
    states: dict[int | str, dict[str, Any]] = {
        200: {"description": "The models are loaded."},
        204: {"description": "They are loading."},
    }

    @app.get("/ping", tags=["health"], summary="Is it ready?", response_class=Response, responses=states)
    async def ping() -> Response:
        """204 while the models are loading, 200 when they are ready: what load balancers on RunPod expect."""
        return Response(status_code=HTTPStatus.OK if await ready() else HTTPStatus.NO_CONTENT)


class OneErrorShape:
    """Middleware: rewrites every error answer that is not in our shape yet, and refuses bodies over a limit."""

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started: Message | None = None
        body = b""
        received, more = 0, True

        async def counted() -> Message:
            nonlocal received, more
            message = await receive()
            received += len(message.get("body", b""))
            more = message.get("more_body", False)
            return message

        async def limited() -> Message:
            message = await counted()
            if received > self.max_upload_bytes:
                raise _TooLarge
            return message

        async def reshaped(message: Message) -> None:
            nonlocal started, body
            if received > self.max_upload_bytes:  # whatever the app makes of that: we answer below
                return
            if message["type"] == "http.response.start" and message["status"] >= 400:
                started = message
            elif started is None:
                await send(message)
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")
                if not message.get("more_body"):
                    await self._send(started, body, scope, receive, send)

        with suppress(_TooLarge, ClientDisconnect):  # who goes away in mid-body gets no answer; BentoML catches both
            await self.app(scope, limited, reshaped)
        if received > self.max_upload_bytes:
            while more and received < 2 * self.max_upload_bytes:  # many callers read nothing until they have sent all
                await counted()
            limit = f"{self.max_upload_bytes / 2**20:.0f} MiB"
            answer = refuse(Refusal(413, f"The request is larger than {limit}; send smaller files.", "too_large"))
            await answer(scope, receive, send)

    async def _send(self, started: Message, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = json.loads(body)
        except ValueError:
            content = body.decode(errors="replace")
        if isinstance(content, dict) and isinstance(content.get("error"), dict):
            await send(started)
            await send({"type": "http.response.body", "body": body})
            return
        answer = _translated(started["status"], content, scope)
        answer.headers.update(
            {
                name.decode(): value.decode("latin-1")
                for name, value in started["headers"]
                if name[:2] == b"x-" or name == b"allow"
            }
        )
        await answer(scope, receive, send)


class SecurityHeaders:
    """Middleware: what OWASP's REST cheat sheet asks of every answer, for the day a browser is made to open one.

    Pages, and what belongs to them, may run scripts, be framed and be cached.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Referrer-Policy", "no-referrer")
                if not headers.get("content-type", "").startswith(PAGES):
                    headers.setdefault("Cache-Control", "no-store")
                    headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
                    headers.setdefault("X-Frame-Options", "DENY")
            await send(message)

        await self.app(scope, receive, secured if scope["type"] == "http" else send)


class _TooLarge(Exception):  # noqa: N818 - never leaves this module
    pass


def _translated(status: int, content: Any, scope: Scope) -> JSONResponse:
    """BentoML's error answer in our shape."""
    phrase = HTTPStatus(status).phrase
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if isinstance(content, dict) and content.get("detail"):
        first = content["detail"][0]
        param = ".".join(str(part) for part in first.get("loc", ())) or None
        said = first["msg"][0].lower() + first["msg"][1:]
        message = f"{param}: {said}." if param else f"The request cannot be read: {said}."
        code = "missing" if first["type"] == "missing" else "invalid_value"
        return refuse(Refusal(status, message, code, param))
    if status >= 500:
        message = "Something failed here; the server's log has the details under the request's id."
        return refuse(Refusal(status, message, "internal_error"))
    said = content.get("error") if isinstance(content, dict) else None
    message = str(said) if said else f"{scope['method']} {scope['path']}: {phrase}."
    return refuse(Refusal(status, message, HTTPStatus(status).name.lower()))
