"""Ways of BentoML's server that do not suit a public one, mended from outside. Call each once, before serving.

These are BentoML's own insides, which may change with any version: it is pinned, and each patch has its test.
"""

import sys
from collections.abc import Iterable
from typing import Any

from _bentoml_impl.serde import MultipartSerde
from _bentoml_impl.server import app
from bentoml._internal.context import server_context
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from bentoml.exceptions import BentoMLException, InvalidArgument
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

from infinitetalk.errors import InputError


def adapt_forms(max_part_bytes: int) -> None:
    """Multipart forms.

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
    """The limit on the time until an answer.

    For each request BentoML sets a timer, and never stops it: until the limit, the timer holds all that the request
    held, and a request that fails without an answer waits as long. Calls that wait for a video would need a limit of
    days.
    """

    async def answer(limit: TimeoutMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        await limit.app(scope, receive, send)

    TimeoutMiddleware.__call__ = answer  # type: ignore[method-assign, assignment]


def log_failures_only() -> None:
    """The log. BentoML writes a traceback for each request that it refuses, with some of what was sent in it."""
    log = app.log_exception

    def log_failure(request: Request) -> None:
        error = sys.exception()
        refused = isinstance(error, ValidationError) or (isinstance(error, BentoMLException) and error.error_code < 500)
        if not refused:
            log(request)

    app.log_exception = log_failure


def count_by_route(paths: Iterable[str]) -> None:
    """The metrics of the requests; paths: the routes'.

    BentoML counts by the path as it was sent, and for ever: several series for each video, and for each path that a
    stranger tries. From here on a path counts as its route, `/v1/videos/{video_id}`, or as `other`.
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
