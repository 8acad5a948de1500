"""What all gRPC calls share: whose a call is, and how it is refused. Both are HTTP's own, in gRPC's words.

A refused call has the status of google.rpc.Code that CODES gives it, and a google.rpc.Status in its trailing metadata:
its details are the error object (avatar.v1.VideoError), and a google.rpc.RetryInfo where HTTP says `Retry-After`.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import grpc
from google.protobuf.json_format import ParseDict
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from starlette.datastructures import Headers

from avatar_api import metrics
from avatar_api.auth import NO_KEY, Keys
from avatar_api.protos.avatar_pb2 import VideoError
from avatar_api.refusals import REFUSABLE, Refusal, refusal

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself says of a message that is too large
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
LONGEST_TEXT = 1000  # characters of an error: trailing metadata beyond 8 kB is refused by clients
LARGEST_MESSAGE = 2**31 - 1  # bytes: protobuf's own limit

OPEN = ("/grpc.health.v1.Health/", "/bentoml.grpc.v1.BentoService/ServiceMetadata")
"""Need no key: load balancers ask for the first, and BentoML's clients can send none with the second."""

_client: ContextVar[str] = ContextVar("client")


def client() -> str:
    """Whose call this is, once it came through `Authenticated`."""
    return _client.get()


class Authenticated(grpc.aio.ServerInterceptor):
    """A call without a valid key is refused before any message of it is read."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        if not handler_call_details.method.startswith(OPEN):
            metadata = handler_call_details.invocation_metadata or ()
            whose = self.keys.client(Headers({key: value for key, value in metadata if isinstance(value, str)}))
            if whose is None:
                return grpc.stream_stream_rpc_method_handler(_without_key)
            _client.set(whose)
        return await continuation(handler_call_details)


async def _without_key(_: object, context: Context) -> None:
    await abort(context, Refusal(401, NO_KEY, "invalid_api_key"))


@asynccontextmanager
async def answering(context: Context) -> AsyncIterator[None]:
    """Around the work of a call: what is raised there becomes its status."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except REFUSABLE as error:
        await abort(context, refusal(error))
    except Exception:
        logger.exception("a gRPC call failed")
        await abort(context, Refusal(500, "Something failed here; the server's log has the details.", "internal_error"))


async def abort(context: Context, refused: Refusal) -> NoReturn:
    metrics.ERRORS.labels(refused.code).inc()
    code, error = CODES[refused.status], {name: text and text[:LONGEST_TEXT] for name, text in refused.error.items()}
    message = refused.message[:LONGEST_TEXT]
    status = Status(code=code.value[0], message=message)
    status.details.add().Pack(ParseDict(error, VideoError()))
    if refused.retry_seconds is not None:
        retry = RetryInfo()
        retry.retry_delay.FromSeconds(refused.retry_seconds)
        status.details.add().Pack(retry)
    await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))
    raise AssertionError("abort raises")
