"""The HTTP around the Bento's own: health, one shape for every error, a limit on what is sent, headers for browsers.

An error is always `{"error": {"type", "code", "message", "param"}}`; BentoML's own answers are brought into that shape.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from http import HTTPStatus
from itertools import chain
from typing import Any

from _bentoml_impl.serde import MultipartSerde
from bentoml._internal.context import server_context
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml.exceptions import InvalidArgument
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.routing import Route, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avatar_api import metrics
from infinitetalk.errors import InputError

PAGES = ("text/html", "text/css", "text/javascript", "application/javascript")


def error_object(status: int, message: str, code: str, param: str | None = None) -> dict[str, str | None]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"type": kind, "code": code, "message": message, "param": param}


def error_response(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    metrics.ERRORS.labels(code).inc()
    return JSONResponse({"error": error_object(status, message, code, param)}, status_code=status)


def create_app(
    ready: Callable[[], Any],
    routers: Sequence[APIRouter],
    refusable: Sequence[type[Exception]],
    refuse: Callable[[Exception], JSONResponse],
) -> FastAPI:
    """ready: an async function that says whether the models are loaded; refuse: the answer to an error of a refusable
    type."""
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
        return error_response(422, message, "invalid_value", param)

    for kind in refusable:

        @app.exception_handler(kind)
        async def refused(request: Request, error: Exception) -> JSONResponse:
            return refuse(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        path = request.url.path
        message = f"{request.method} {path}: {status.phrase}."
        answer = error_response(status, message, status.name.lower())
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


def adapt_forms(max_part_bytes: int) -> None:
    """Mend some ways of BentoML with multipart forms; call it once, before serving.

    A text where a file belongs is refused: BentoML would take it for a URL and fetch it from here. A text may be as
    long as the whole request: beyond Starlette's 1 MiB, BentoML answers 500, as it does to a form that cannot be read.
    A file's name is dropped: BentoML would make it part of a path.
    """
    read_form, parse_request = Request.form, MultipartSerde.parse_request

    async def form(request: Request, **limits: Any) -> FormData:
        try:
            return await read_form(request, max_part_size=max_part_bytes, **limits)
        except (HTTPException, MultiPartException) as error:
            said = error.detail if isinstance(error, HTTPException) else error.message
            raise InputError("body", f"The form cannot be read ({said.rstrip('.')}); send it whole.") from None

    async def parse(serde: MultipartSerde, request: Request, form_model: Any) -> Any:
        try:
            return await parse_request(serde, request, form_model)
        except ValidationError:
            raise
        except (ValueError, RecursionError) as error:  # in a field that BentoML tries to read as JSON
            message = str(error) if isinstance(error, InputError) else f"A field of the form cannot be read: {error}."
            raise InvalidArgument(message) from error

    async def only_files(part: str | UploadFile) -> UploadFile:
        if isinstance(part, UploadFile):
            part.filename = "upload"
            return part
        raise InvalidArgument(f"A form field that takes a file holds a text ({part[:40]!r}); send the file itself.")

    MultipartSerde.ensure_file = staticmethod(only_files)
    MultipartSerde.parse_request = parse
    Request.form = form  # type: ignore[method-assign, assignment]


def end_with_the_answer() -> None:
    """Mend BentoML's limit on the time until an answer; call it once, before serving.

    For each request it sets a timer, and never stops it: until the limit, the timer holds all that the request held,
    and a request that fails without an answer waits as long. Calls that wait for a video would need a limit of days.
    """

    async def answer(limit: TimeoutMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        await limit.app(scope, receive, send)

    TimeoutMiddleware.__call__ = answer  # type: ignore[method-assign, assignment]


def count_by_route(paths: Iterable[str]) -> None:
    """Mend BentoML's metrics of the requests; call it once, before serving, with the routes' paths.

    It counts by the path as it was sent, and for ever: several series for each video, and for each path that a stranger
    tries. From here on a path counts as its route, `/v1/videos/{video_id}`, or as `other`.
    """
    set_up = RunnerTrafficMetricsMiddleware._setup
    patterns = {path: compile_path(path)[0] for path in paths}

    def route(path: str) -> str:
        if path in server_context.service_routes:
            return path
        return next((known for known, pattern in patterns.items() if pattern.match(path)), "other")

    class ByRoute:
        def __init__(self, metric: Any) -> None:
            self._metric = metric

        def labels(self, endpoint: str, **others: str) -> Any:
            return self._metric.labels(endpoint=route(endpoint), **others)

    def set_up_by_route(middleware: Any) -> None:
        set_up(middleware)
        for name in vars(middleware):
            if name.startswith(("metrics_request_", "metrics_websocket_")):
                setattr(middleware, name, ByRoute(getattr(middleware, name)))

    RunnerTrafficMetricsMiddleware._setup = set_up_by_route  # type: ignore[method-assign, assignment]


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
            answer = error_response(413, f"The request is larger than {limit}; send smaller files.", "too_large")
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
        return error_response(status, message, "missing" if first["type"] == "missing" else "invalid_value", param)
    if status >= 500:
        message = "Something failed here; the server's log has the details under the request's id."
        return error_response(status, message, "internal_error")
    said = content.get("error") if isinstance(content, dict) else None
    message = str(said) if said else f"{scope['method']} {scope['path']}: {phrase}."
    return error_response(status, message, HTTPStatus(status).name.lower())
