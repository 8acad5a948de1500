"""What RunPod's load balancing endpoints want of HTTP: health on a port of its own, answers within minutes, a way back.

RunPod ends a request after five and a half minutes. One that waits for its video is answered before that, with the
video in the making, to be asked for under `/v1/videos`. Only the worker that has it knows it, unless workers share a
database: its name is in every answer, and RunPod sends a request that carries it there.
"""

import math
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from avatar_api.http import add_health

HERE = "RUNPOD_ENDPOINT_ID" in os.environ
LONGEST_ANSWER = 300.0 if HERE else math.inf
"""Seconds after which a caller who waits for a video is told where to find it."""
WORKER_HEADER = "X-Runpod-Worker-Id"


def in_the_making(video: Mapping[str, object]) -> JSONResponse:
    """The answer to a caller who has waited for as long as may be. The video goes on."""
    headers = {"Location": f"/v1/videos/{video['id']}", "Retry-After": "30"}
    return JSONResponse(dict(video), status_code=202, headers=headers)


class NamesWorker:
    """Middleware: every answer says which worker gave it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._worker = os.environ.get("RUNPOD_POD_ID", "") if HERE else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[WORKER_HEADER] = self._worker
            await send(message)

        await self.app(scope, receive, named if self._worker and scope["type"] == "http" else send)


async def serve_health(ready: Callable[[], Awaitable[bool]]) -> None:
    """`/ping` on PORT_HEALTH, until cancelled; returns at once where that is the port of everything else."""
    port = os.environ.get("PORT_HEALTH")
    if not HERE or port is None or port == os.environ.get("PORT"):
        return
    app = FastAPI(openapi_url=None)
    add_health(app, ready)
    config = uvicorn.Config(app, host="0.0.0.0", port=int(port), lifespan="off", log_config=None, access_log=False)  # noqa: S104
    await _QuietServer(config).serve()


class _QuietServer(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """BentoML's server in this process has them."""
        yield
