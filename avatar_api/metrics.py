"""What Prometheus hears of the videos at /metrics, beside BentoML's own metrics of the requests.

BentoML serves it. Its processes write what they count into one folder (prometheus_client's multiprocess mode), so the
runner's figures come with those of the API process that answers. How many jobs are in the queue is no process's own
figure: the database is asked when Prometheus asks (`queue`), and every API process says the same.
"""

import logging
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

# From the tests' models on a CPU to the published ones on one GPU, in seconds.
_STEP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120)
_CLIP = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 150, 180, 240, 300, 450, 600, 1200, 2400)
_STAGE = (0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 2400, 3600, 7200, 14400, 28800)
_WAIT = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 2400, 3600, 7200, 14400, 28800, 86400)

WAIT_SECONDS = Histogram("avatar_job_wait_seconds", "From a video's request to its first start.", buckets=_WAIT)
STEP_SECONDS = Histogram(
    "avatar_step_seconds", "One denoising step; not a clip's first, which comes with other work.", buckets=_STEP
)
CLIP_SECONDS = Histogram("avatar_clip_seconds", "One clip, until it is recorded.", buckets=_CLIP)
STAGE_SECONDS = Histogram(
    "avatar_stage_seconds",
    "One stage of a video that came to its end: preparing, generating, encoding or uploading.",
    ["stage"],
    buckets=_STAGE,
)
ENDED = Counter("avatar_videos", "Videos that have ended: completed, failed or cancelled.", ["state"])
FAILURES = Counter("avatar_failures", "Attempts at a video that failed, the last one or not, by error code.", ["code"])
ERRORS = Counter("avatar_request_errors", "Requests that were answered with an error, by error code.", ["code"])

START_SECONDS = Gauge(
    "avatar_start_seconds",
    "What the start took: the verification, each part of the models, the first video's first step, the first video.",
    ["part"],
    multiprocess_mode="mostrecent",
)
_started = set[str]()

_GPU = {
    name: Gauge(f"avatar_gpu_memory_{name}_bytes", documentation, ["gpu"], multiprocess_mode="mostrecent")
    for name, documentation in (
        ("allocated", "GPU memory that the runner's tensors take, as of the last step."),
        ("reserved", "GPU memory that the runner holds, the allocated included."),
        ("total", "The GPU's memory."),
    )
}  # the last word of a runner that is gone stands until another one speaks for that GPU


def start_took(part: str, seconds: float) -> None:
    """A part of this process's start; the first word counts."""
    if part not in _started:
        _started.add(part)
        START_SECONDS.labels(part).set(seconds)
        logger.info("start: %s took %.2f s", part, seconds)


def gpu_memory(gpu: str, **sizes: int) -> None:
    """gpu: its UUID, the same after a restart; sizes: allocated, reserved and total, in bytes."""
    for name, size in sizes.items():
        _GPU[name].labels(gpu).set(size)


def queue(jobs: Mapping[str, int] | None) -> str:
    """The jobs in each state, as Prometheus reads it; None: the database did not say."""
    registry = CollectorRegistry()
    registry.register(_Queue(jobs))
    return generate_latest(registry).decode()


class _Queue(Collector):
    def __init__(self, jobs: Mapping[str, int] | None) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("avatar_database_up", "Whether the job database answers.", self._jobs is not None)
        if self._jobs is not None:
            jobs = GaugeMetricFamily("avatar_jobs", "Jobs in the database, by state.", labels=["state"])
            for state, count in self._jobs.items():
                jobs.add_metric([state], count)
            yield jobs
