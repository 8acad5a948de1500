"""How a runner is told to end: a flag, and until when a clip in the making may go on."""

import threading
import time


class Shutdown:
    """Tells the loop to end: at once between jobs, and within a job when a clip ends or the grace time does."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._deadline = float("inf")

    def ask(self, grace: float) -> None:
        """`grace`: seconds that a clip in the making may still take."""
        self._deadline = time.monotonic() + grace
        self._asked.set()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    @property
    def overdue(self) -> bool:
        return time.monotonic() > self._deadline

    def wait(self, seconds: float) -> None:
        self._asked.wait(seconds)
