"""The gRPC server beside HTTP's: both services, standard health and reflection, TLS, and an orderly end."""

import asyncio
import logging
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from types import FrameType

import grpc
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from avatar_api.auth import Keys
from avatar_api.grpc_bento import BentoService
from avatar_api.grpc_calls import LARGEST_MESSAGE, Authenticated
from avatar_api.grpc_videos import AvatarService
from avatar_api.protos.avatar_pb2_grpc import add_AvatarServiceServicer_to_server
from avatar_api.protos.bento_service_pb2_grpc import add_BentoServiceServicer_to_server
from avatar_api.settings import ServiceSettings
from avatar_api.videos import Backend

logger = logging.getLogger(__name__)

SERVICES = ("bentoml.grpc.v1.BentoService", "avatar.v1.AvatarService")
LOADING_SECONDS, READY_SECONDS = 1.0, 5.0  # between looks whether the models are loaded, and whether they still are


class GrpcServer:
    """Runs in the event loop that starts it."""

    def __init__(self, backend: Backend, keys: Keys, ready: Callable[[], Awaitable[bool]]) -> None:
        """ready: whether the models are loaded, which is what health says."""
        settings = backend.settings
        self._credentials = _credentials(settings)
        self._ready = ready
        self._stopping: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            interceptors=[Authenticated(keys)],
            options=[
                ("grpc.so_reuseport", 1),  # several API workers share the port
                ("grpc.max_receive_message_length", min(settings.max_upload_bytes, LARGEST_MESSAGE)),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", 60_000),  # a caller whose machine is gone is noticed
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # and may ask us the same while it waits
            ],
        )
        add_BentoServiceServicer_to_server(BentoService(backend, lambda: self._stopping is not None), self._server)
        add_AvatarServiceServicer_to_server(AvatarService(backend), self._server)
        self._health = health.aio.HealthServicer()
        add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which is a free one for 0."""
        await self._tell_health(False)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self._credentials is None:
            bound = self._server.add_insecure_port(address)
        else:
            bound = self._server.add_secure_port(address, self._credentials)
        await self._server.start()
        self._watching = asyncio.create_task(self._watch_readiness())
        logger.info("gRPC on %s port %d%s", host, bound, " with TLS" if self._credentials else "")
        return bound

    async def stop(self, grace: float) -> None:
        """Say NOT_SERVING, take no further calls, give the running ones `grace` seconds to finish. Once or again."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace))
        await self._stopping

    def stop_at_sigterm(self, grace: float) -> None:
        """Begin to stop at the signal itself: shutdown hooks wait until HTTP's requests are done."""
        loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

        def asked(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self.stop(grace)))
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, asked)

    async def _stop(self, grace: float) -> None:
        self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def _watch_readiness(self) -> None:
        while True:
            try:
                ready = await self._ready()
            except Exception as error:
                logger.debug("the runner does not answer: %s", error)
                ready = False
            await self._tell_health(ready)
            await asyncio.sleep(READY_SECONDS if ready else LOADING_SECONDS)

    async def _tell_health(self, ready: bool) -> None:
        status = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def check(settings: ServiceSettings) -> None:
    """Can it be started? Asked once before there are workers, since these share a port that nobody else may have.

    Raises ValueError.
    """
    if not settings.grpc_port:
        return
    _credentials(settings)
    family = socket.AF_INET6 if ":" in settings.grpc_host else socket.AF_INET
    try:
        socket.create_server((settings.grpc_host, settings.grpc_port), family=family).close()
    except OSError as error:
        address, reason = f"{settings.grpc_host} port {settings.grpc_port}", os.strerror(error.errno or 0)
        raise ValueError(
            f"gRPC cannot listen on {address} ({reason}); set AVATAR_GRPC_HOST and AVATAR_GRPC_PORT, 0 for no gRPC."
        ) from error


def _credentials(settings: ServiceSettings) -> grpc.ServerCredentials | None:
    certificate, key = settings.grpc_tls_cert, settings.grpc_tls_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError("AVATAR_GRPC_TLS_CERT and AVATAR_GRPC_TLS_KEY belong together; set both or none.")
    try:
        # gRPC would not say what is wrong. A password is given so that nobody is asked for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    except OSError as error:
        raise ValueError(
            f"AVATAR_GRPC_TLS_CERT ({certificate}) and AVATAR_GRPC_TLS_KEY ({key}) cannot be used ({error}); "
            "they are a certificate chain and its private key without a password, in PEM."
        ) from error
