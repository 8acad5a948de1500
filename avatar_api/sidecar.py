"""`bentoml serve` beside the queue worker: kept running whatever is killed, and ended with it.

Killed with -9, BentoML's arbiter leaves its services behind, which keep the port and the GPU. So every process of the
server carries a mark in its environment, and whoever starts a server ends those that carry the mark first, also those
of a worker that was killed itself.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx2

from avatar_api import loading

logger = logging.getLogger(__name__)

MARK = "AVATAR_SIDECAR"
STOP_SECONDS = 60  # what a server has to end in order
ASK_SECONDS = 0.5  # between questions whether it is ready
AGAIN_SECONDS = 2.0  # before a server that has ended is started again


class Sidecar:
    def __init__(self, arguments: Sequence[str], port: int, home: Path) -> None:
        """arguments: further ones of `bentoml serve`; home: the service's, which no other sidecar shares."""
        command = [sys.executable, "-m", "bentoml", "serve", *arguments]
        self._command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        self._url, self._mark = f"http://127.0.0.1:{port}/ping", str(home.absolute())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_running, name="sidecar", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Returns when the models are loaded, however long that takes: RunPod has a limit of its own."""
        while True:
            with suppress(httpx2.TransportError):
                if httpx2.get(self._url, timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(ASK_SECONDS)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _keep_running(self) -> None:
        while not self._stopping.is_set():
            self._end_leftovers()
            # Ctrl-C and a container's SIGTERM are the worker's, who first answers the job that it has.
            environment = os.environ | {MARK: self._mark, "AVATAR_AUTH": "off"}  # nobody else comes in at 127.0.0.1
            process = subprocess.Popen(self._command, env=environment, start_new_session=True)
            while process.poll() is None and not self._stopping.wait(ASK_SECONDS):
                pass
            if process.returncode is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            elif process.returncode == loading.EXIT_STATUS:
                logger.critical("the models cannot be loaded: this worker ends, too")
                self._end_leftovers()
                os._exit(loading.EXIT_STATUS)
            elif not self._stopping.is_set():
                logger.critical("the server ended with %s; it is started again", process.returncode)
                self._stopping.wait(AGAIN_SECONDS)
        self._end_leftovers()

    def _end_leftovers(self) -> None:
        mark = f"{MARK}={self._mark}".encode()
        while marked := [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in _environment(entry)]:
            for process in marked:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)


def _environment(process: Path) -> list[bytes]:
    """Of a process that is there and ours; a zombie has none."""
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []
