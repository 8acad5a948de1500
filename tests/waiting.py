"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 300  # seconds: what whole servers may take on a busy machine

Answer = TypeVar("Answer")


def eventually(
    ask: Callable[[], Answer | None], otherwise: object = "it never came about", seconds: float = 60
) -> Answer:
    """The first answer that is true. Fails when none is for so long; `otherwise` says what did not happen."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not (answer := ask()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(pause)
        pause = min(2 * pause, 0.04)
    return answer
