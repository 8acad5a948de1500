"""The Bento as it is, with a stand-in for the pipeline: `bentoml serve tests.stand_in_service:AvatarApi`."""

import sys

from service import AvatarApi

__all__ = ["AvatarApi"]

if "avatar_runner" in sys.argv:  # the API process shall be no larger than it is
    import avatar_api.worker
    from tests.stand_in import StandIn

    avatar_api.worker.load = lambda *_: StandIn()  # type: ignore[assignment]
