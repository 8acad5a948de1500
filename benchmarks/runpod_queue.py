"""Does RunPod's queue get its answers? Jobs under kills, and nonsense, through RunPod's own loop.

    python -m benchmarks.runpod_queue [--jobs 50] [--kills 60] [--nonsense 1000] [--seed 0]

RunPod's job API is one on loopback (tests/runpod_queue.py) that gives a job again if its worker died; the pipeline is a
stand-in. First the queue worker, the API and the runners are killed with -9 at random: each job has to be answered
exactly once, with the very video that comes when nobody disturbs, or, where its input is wrong, with the error. Then
come inputs that are wrong in every way: each has to be answered, with a caller's error or a video, by one and the same
process. Exits non-zero otherwise. Most of half an hour: RunPod's loop takes a second between two jobs.
"""

import argparse
import base64
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kills import PICTURE, voice
from benchmarks.mutations import media
from tests.runpod_queue import JobApi, Worker, eventually
from tests.supervised import RUNNERS, Supervised

BETWEEN_KILLS = 1.5  # seconds, on average
WRONG_EVERY = 7  # jobs, under kills, has an input that is wrong
KINDS = [{"seed": seed, "clips": clips, "steps": 40} for seed, clips in enumerate((1, 3, 2))]
JUNK: list[Any] = [
    None,
    "",
    "x" * 5000,
    "\0",
    "\ud800",
    "💥",
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    True,
    [],
    {},
    [[]] * 9,
]
TEXTS = [
    "file:///etc/passwd",
    "/etc/passwd",
    "/runpod-volume/../etc/passwd",
    "/runpod-volume/none.png",
    "http://127.0.0.1:1/me.png",
    "http://169.254.169.254/latest/meta-data",
    "http://[::1",
    "ftp://example.com/me.png",
    "data:image/png;base64",
    "data:image/png;base64,@@@@",
    "data:,",
    "me.png",
]


@dataclass
class Figures:
    jobs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    given_again: int = 0
    right_videos: int = 0
    errors_of_callers: int = 0
    seconds: float = 0
    wrong: list[str] = field(default_factory=list)
    """What must not be, by job."""


def request(kind: dict[str, int]) -> dict[str, Any]:
    files = {"input_reference": _uri(PICTURE.read_bytes()), "audio": _uri(voice(kind["clips"]))}
    return {"prompt": "A woman talks.", "size": "64x64", "seed": kind["seed"], "steps": kind["steps"], **files}


def under_kills(folder: Path, jobs: int, kills: int, seed: int = 0) -> Figures:
    chance, api, figures, begun = random.Random(seed), JobApi(), Figures(jobs), time.monotonic()  # noqa: S311
    with Supervised(folder / "home") as product, Worker(api, product.home) as worker:
        right = [
            api.answer(f"kind-{number}", request(kind)).output["video_base64"] for number, kind in enumerate(KINDS)
        ]
        asked = []
        for number in range(jobs):
            wrong = {"size": "3x3"} if number % WRONG_EVERY == WRONG_EVERY - 1 else {}
            asked.append(api.ask(f"job-{number}", request(KINDS[number % len(KINDS)]) | wrong))
        while not all(job.answers for job in asked):
            time.sleep(chance.expovariate(1 / BETWEEN_KILLS))
            if figures.kills.total() >= kills:
                continue
            victim = chance.choice(["api", *(f"runner-{number}" for number in range(RUNNERS)), "worker"])
            if victim != "worker":
                figures.kills[victim] += product.kill(victim)
            elif figures.kills["worker"] < sum(job.taken for job in asked):  # each lives to take a job
                worker.kill()
                figures.kills["worker"] += 1
                figures.given_again += len(api.lost())
                worker.start()
            product.check()
        for number, job in enumerate(asked):
            if len(job.answers) != 1:
                figures.wrong.append(f"{job.id}: answered {len(job.answers)} times")
            elif number % WRONG_EVERY == WRONG_EVERY - 1:
                figures.errors_of_callers += (said := _caller_error(job.answers[0])) is None
                figures.wrong += [] if said is None else [f"{job.id}: {said}"]
            elif job.answers[0].get("output", {}).get("video_base64") != right[number % len(KINDS)]:
                figures.wrong.append(f"{job.id}: another video: {str(job.answers[0])[:200]}")
            else:
                figures.right_videos += 1
    figures.seconds = round(time.monotonic() - begun, 1)
    return figures


def nonsense(
    folder: Path, numbers: Iterable[int], seed: int = 0, progress: Callable[[Any], Any] = lambda numbers: numbers
) -> Figures:
    api, figures, begun = JobApi(), Figures(), time.monotonic()
    with Supervised(folder / "home", fetch_seconds=2) as product, Worker(api, product.home) as worker:
        first = worker.process.pid
        for number in progress(numbers):
            wanted = _mutated(random.Random(f"{seed} {number}"))  # noqa: S311
            job = api.answer(f"nonsense-{number}", wanted)
            figures.jobs += 1
            said = _caller_error(job.answers[0]) if "error" in job.answers[0] else None
            figures.errors_of_callers += said is None and "error" in job.answers[0]
            figures.right_videos += "output" in job.answers[0]
            figures.wrong += [] if said is None else [f"{number}: {said}"]
        eventually(lambda: all(len(job.answers) == 1 for job in api.jobs.values()))
        if worker.process.poll() is not None or worker.process.pid != first:
            figures.wrong.append("the worker died")
        product.check()
    figures.seconds = round(time.monotonic() - begun, 1)
    return figures


def _caller_error(answer: dict[str, Any]) -> str | None:
    """What is wrong with the answer to a caller's mistake."""
    error = json.loads(answer["error"])
    if set(error) != {"type", "code", "message", "param"} or "Traceback" in answer["error"]:
        return f"of another shape: {answer['error'][:300]}"
    return None if error["type"] == "invalid_request_error" else f"not the caller's: {answer['error'][:300]}"


def _mutated(chance: random.Random) -> Any:
    wanted = request(KINDS[0]) | {"steps": 1}
    way = chance.randrange(6)
    if way == 0:
        return chance.choice(JUNK)
    if way == 1:
        wanted[chance.choice([*wanted, "speakers", "stream", "max_seconds", "webhook_url", "quality"])] = chance.choice(
            JUNK
        )
    elif way == 2:
        wanted[chance.choice(["frames", "Prompt", "\0", "💥", "__class__", "id"])] = chance.choice(JUNK)
    elif way == 3:
        del wanted[chance.choice(list(wanted))]
        wanted[chance.choice(list(wanted))] = chance.choice(JUNK)
    elif way == 4:
        wanted[chance.choice(["input_reference", "audio", "audio_2"])] = chance.choice(TEXTS)
    else:
        name, kind = chance.choice([("input_reference", "picture"), ("input_reference", "film"), ("audio", "sound")])
        content = bytearray(chance.choice(media()[kind]))
        for _ in range(chance.randrange(1, 40)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        wanted[name] = _uri(bytes(content[: chance.randrange(len(content)) if chance.random() < 0.5 else None]))
    return wanted


def _uri(content: bytes) -> str:
    return f"data:;base64,{base64.b64encode(content).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50, help="under kills (%(default)s)")
    parser.add_argument("--kills", type=int, default=60, help="%(default)s")
    parser.add_argument("--nonsense", type=int, default=1000, help="inputs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        proofs = {"kills": under_kills(Path(folder) / "kills", options.jobs, options.kills, options.seed)}
        numbers = range(options.nonsense)
        proofs["nonsense"] = nonsense(
            Path(folder) / "nonsense", numbers, options.seed, lambda all_: track(all_, console=Console(stderr=True))
        )
    table = Table("", *proofs)
    for one in fields(Figures):
        table.add_row(one.name.replace("_", " "), *(str(getattr(figures, one.name)) for figures in proofs.values()))
    Console(width=120).print(table)
    if any(figures.wrong for figures in proofs.values()):
        raise SystemExit("A promise is broken.")


if __name__ == "__main__":
    main()
