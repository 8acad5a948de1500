"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 300  # seconds: how long anything takes on a busy machine

Answer = TypeVar("Answer")


def eventually(ask: Callable[[], Answer | None], otherwise: object = "it never came about") -> Answer:
    """The first answer that is true. Fails after a while; `otherwise` says what did not happen."""
    deadline, pause = time.monotonic() + PATIENCE, 0.01
    while not (answer := ask()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(pause)
        pause = min(2 * pause, 0.04)
    return answer
