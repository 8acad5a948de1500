"""The Bento as it is, with a stand-in for the pipeline: `bentoml serve tests.stand_in_service:AvatarApi`.

AVATAR_TEST_LOADS may name a file with a line for each time that it is loaded and fails: `misfit`, `full` or `killed`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from avatar_api import runpod_balanced
from infinitetalk.errors import CheckpointError
from service import AvatarApi

__all__ = ["AvatarApi"]


def load(*_: object) -> Any:
    from tests.stand_in import StandIn

    file = Path(os.environ.get("AVATAR_TEST_LOADS", os.devnull))
    fails, later = file.read_text().partition("\n")[::2]
    file.write_text(later)
    if fails == "misfit":
        raise CheckpointError("It lacks 'head.weight'.")
    if fails == "full":
        raise MemoryError("Cannot allocate.")
    if fails == "killed":
        os.kill(os.getpid(), signal.SIGKILL)

    return StandIn()


if "avatar_runner" in sys.argv:  # the API process shall be no larger than it is
    import avatar_api.worker

    avatar_api.worker.load = load  # type: ignore[assignment]

if runpod_balanced.HERE:
    runpod_balanced.LONGEST_ANSWER = 1.0
