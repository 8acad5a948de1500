"""Start the service in the way that its surroundings ask for. In the image, container/start.py runs it.

    python -m scripts.start [ARGUMENT…]     arguments of `bentoml serve`

| RunPod sets | what starts |
|---|---|
| `RUNPOD_WEBHOOK_GET_JOB`: a queue endpoint | the queue worker, and beside it the server, on 127.0.0.1 |
| `RUNPOD_ENDPOINT_ID` alone: a load balancing endpoint | the server, on `PORT`; health also on `PORT_HEALTH` |
| neither: a pod, or any other machine | the server, as the arguments say |

RunPod's endpoints ask for RunPod's key before a request comes here, so ours are off there (AVATAR_AUTH). A pod's port
is open to everybody: its callers need a key.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from avatar_api.logs import JsonLines
from avatar_api.settings import ServiceSettings
from avatar_api.sidecar import Sidecar

VOLUME = Path("/runpod-volume")
"""Where RunPod mounts an endpoint's network volume."""
OWN_DATABASE = "sqlite:////tmp/avatar-jobs.db"
PORT = "3000"


def settings_for(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings that RunPod's endpoints need, where nobody has set them."""
    if "RUNPOD_ENDPOINT_ID" not in environment and "RUNPOD_WEBHOOK_GET_JOB" not in environment:
        return {}
    needed = {"AVATAR_AUTH": "off"}
    if Path(environment.get("AVATAR_HOME", "/")).is_relative_to(VOLUME):
        needed["AVATAR_DATABASE_URL"] = OWN_DATABASE  # workers share the volume, and SQLite does not stand that
    if "RUNPOD_WEBHOOK_GET_JOB" in environment:
        # They open a CUDA context of their own, for good, and find fault with a disk that the image fills. Loading the
        # models tries more of the GPU.
        needed |= {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true"}
        needed["RUNPOD_LOG_LEVEL"] = "INFO"  # else its SDK logs what callers send, and the videos
    return {name: value for name, value in needed.items() if name not in environment}


def main(arguments: Sequence[str]) -> None:
    os.environ |= settings_for(os.environ)
    port = os.environ.get("PORT", PORT)
    if "RUNPOD_WEBHOOK_GET_JOB" in os.environ:
        work_for_the_queue(arguments, int(port))
    else:
        balanced = ["--host", "0.0.0.0", "--port", port] if "RUNPOD_ENDPOINT_ID" in os.environ else []  # noqa: S104
        command = [sys.executable, "-m", "bentoml", "serve", *arguments, *balanced]
        os.execv(sys.executable, command)  # noqa: S606


def work_for_the_queue(arguments: Sequence[str], port: int) -> None:
    from avatar_api.runpod_worker import serve  # reads the environment when it is imported

    settings = ServiceSettings()
    line = "%(asctime)s [%(levelname)s] [queue] %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, force=True)  # in place of the libraries' own
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    if settings.log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonLines())
    server = Sidecar(arguments, port, settings.home)
    server.start()
    try:
        serve(settings, [server.wait_until_ready], VOLUME)
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
