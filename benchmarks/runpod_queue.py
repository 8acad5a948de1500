"""Does RunPod's queue get its answers? Jobs under kills, and malformed ones, through RunPod's own loop.

    python -m benchmarks.runpod_queue [--jobs 50] [--kills 100] [--malformed 1000] [--seed 0] [--only kills|malformed]

RunPod's job API is one on loopback (tests/runpod_queue.py) that gives a job again if its worker died; the pipeline is a
stand-in. First the queue worker and the server, which is the API and the runners, are killed with -9 by turns, half of
the kills each, at random moments of the jobs: each job has to be answered exactly once, with the very video that comes
when nobody disturbs, or, where its input is wrong, with the error. Then come inputs with something wrong in them, made
with the mutators of benchmarks/mutations.py: each has to be answered exactly once, with an error that names the field
or with a video, by one and the same process, which holds no more memory and files in the end than before. The seed and
the number of a malformed input make it again: --first N --malformed 1. Exits non-zero if a promise is broken. Most of
an hour: RunPod's loop takes a second between two jobs.
"""

import argparse
import base64
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import av
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import track
from rich.table import Table

from avatar_api.jobs import JobStore
from benchmarks.kills import PICTURE, files_in, pieces, voice
from benchmarks.mutations import (
    FIELDS,
    GROWTH_FILES,
    GROWTH_MB,
    TEXTS,
    VALUES,
    Chance,
    is_of_the_caller,
    media,
    mutated,
)
from scripts.start import VOLUME
from tests.runpod_queue import Asked, JobApi, Worker, data_uri
from tests.served import Footprint
from tests.supervised import RUNNERS, Supervised
from tests.waiting import PATIENCE, eventually

MOMENT = 2.0  # seconds: within so many of a job's taking comes a kill
WRONG_EVERY = 7  # jobs, under kills, has a size that is none
KINDS = [{"seed": seed, "clips": clips, "steps": 100} for seed, clips in enumerate((1, 3, 2))]
WARM = 200  # malformed inputs, until everything was used once
PATHS = ["/etc/passwd", f"{VOLUME}", f"{VOLUME}/none.png", f"{VOLUME}/../etc/passwd"]
"""What only RunPod's jobs may hold: files of the network volume."""


@dataclass
class Figures:
    jobs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    in_the_making: Counter[str] = field(default_factory=Counter)
    """Those of them that came before the job's answer."""
    given_again: int = 0
    right_videos: int = 0
    errors_of_callers: int = 0
    seconds: float = 0
    warm: str = ""
    """What the queue worker and a runner held after the first inputs."""
    after: str = ""
    """And after all."""
    files_left: int = 0
    """Temporary ones, those without a job, and pieces of finished videos."""
    wrong: list[str] = field(default_factory=list)
    """What must not be, by job."""

    def note(self, job: Asked, problem: str | None) -> None:
        """Count a job's answer. problem: what is wrong with it."""
        if len(job.answers) != 1:
            problem = f"answered {len(job.answers)} times"
        if problem is not None:
            self.wrong.append(f"{job.id}: {problem}")
        elif "error" in job.answers[0]:
            self.errors_of_callers += 1
        else:
            self.right_videos += 1


# Under kills


def request(kind: dict[str, int]) -> dict[str, Any]:
    files = {"input_reference": data_uri(PICTURE.read_bytes()), "audio": data_uri(voice(kind["clips"]))}
    return {"prompt": "A woman talks.", "size": "64x64", "seed": kind["seed"], "steps": kind["steps"], **files}


def under_kills(
    folder: Path,
    jobs: int,
    kills: int,
    seed: int = 0,
    progress: Callable[[Any], Any] = lambda numbers: numbers,
) -> Figures:
    chance, api, figures, begun = Chance(seed), JobApi(), Figures(jobs), time.monotonic()
    victims = ["worker", "server"] * (kills // 2)
    chance.shuffle(victims)
    asked: list[Asked] = []
    with Supervised(folder / "home") as product, Worker(api, product.home) as worker:
        right = [
            api.answer(f"kind-{number}", request(kind)).output["video_base64"] for number, kind in enumerate(KINDS)
        ]
        for number in progress(range(jobs)):
            wrong = {"size": "3x3"} if _wrong(number) else {}
            job = api.ask(f"job-{number}", request(KINDS[number % len(KINDS)]) | wrong)
            asked.append(job)
            again = 0
            for victim in victims[len(victims) * number // jobs : len(victims) * (number + 1) // jobs]:
                eventually(partial(_taken, job, again), f"{job.id} is not taken", seconds=PATIENCE)
                time.sleep(chance.uniform(0, MOMENT))
                figures.in_the_making[victim] += not job.answers
                if victim == "worker":
                    worker.kill()
                    again += job.id in api.lost()
                    worker.start()
                else:
                    for role in ("api", *(f"runner-{number}" for number in range(RUNNERS))):
                        product.kill(role)
                figures.kills[victim] += 1
                product.check()
            eventually(partial(getattr, job, "answers"), f"{job.id} was not answered", seconds=PATIENCE)
            figures.given_again += again
    for number, job in enumerate(asked):
        if _wrong(number):
            figures.note(job, _unlike_an_error(job.answers[0], "size"))
        else:
            same = job.answers[0].get("output", {}).get("video_base64") == right[number % len(KINDS)]
            figures.note(job, None if same else f"another video: {str(job.answers[0])[:200]}")
    figures.seconds = round(time.monotonic() - begun, 1)
    return figures


def _taken(job: Asked, again: int) -> bool:
    """Does the worker have it, or had it? again: how often it was given again."""
    return bool(job.answers) or job.taken > again


def _wrong(number: int) -> bool:
    return number % WRONG_EVERY == WRONG_EVERY - 1


# Malformed


def malformed(
    folder: Path, numbers: Iterable[int], seed: int = 0, progress: Callable[[Any], Any] = lambda numbers: numbers
) -> Figures:
    api, figures, begun = JobApi(), Figures(), time.monotonic()
    short: dict[str, Any] = {"max_seconds": 5, "fetch_seconds": 2}
    with Supervised(folder / "home", **short) as product, Worker(api, product.home, **short) as worker:
        processes = [psutil.Process(worker.process.pid), product.process("runner-0")]
        before: list[Footprint] = []
        for number in progress(numbers):
            job = api.answer(f"malformed-{number}", make(Chance(f"{seed} {number}")))
            figures.jobs += 1
            if figures.jobs == WARM:
                before = [Footprint.of(process) for process in processes]
        after = [Footprint.of(process) for process in processes]
        if status := worker.drain():
            figures.wrong.append(f"the worker ended with {status}")
        product.check()
        if "Traceback" in worker.log:
            figures.wrong.append(worker.log.partition("Traceback")[2][:2000])
        figures.files_left = _left(product, worker)
    for job in api.jobs.values():
        answer = job.answers[0]
        figures.note(job, _unlike_an_error(answer) if "error" in answer else _unlike_a_video(answer["output"]))
    for name, held, holds in zip(("the worker", "a runner"), before, after, strict=False):
        if holds.resident > held.resident + GROWTH_MB or holds.open_files > held.open_files + GROWTH_FILES:
            figures.wrong.append(f"{name} grew from {held} to {holds}")
    figures.wrong += [f"{figures.files_left} files are left"] if figures.files_left else []
    figures.warm, figures.after = ("; ".join(map(str, held)) for held in (before, after))
    figures.seconds = round(time.monotonic() - begun, 1)
    return figures


def make(chance: Chance) -> Any:
    """A job's input with one to three things wrong; what comes of it may be right all the same."""
    if chance.random() < 0.1:
        return chance.choice(TEXTS + VALUES)
    pictures, sounds = media()[chance.choice(("picture", "film"))], media()["sound"]
    files = {"input_reference": chance.choice(pictures), "audio": chance.choice(sounds)}
    if chance.random() < 0.2:
        files["audio_2"] = chance.choice(sounds)
    wrong_media = chance.random() < 0.4
    if wrong_media:
        for name in chance.sample(sorted(files), chance.randint(1, len(files))):
            files[name] = mutated(chance, files[name])
    wanted: dict[str, Any] = {"size": "64x64", "steps": 1}
    wanted |= {name: data_uri(content) for name, content in files.items()}
    for _ in range(0 if wrong_media else chance.randint(1, 3)):
        name = chance.choice([*FIELDS, "stream", *files])
        if chance.random() < 0.2:
            wanted.pop(name, None)
        elif name in files:
            wanted[name] = chance.choice(TEXTS + PATHS + VALUES)
        else:
            wanted[name] = chance.choice(TEXTS + VALUES)
    return wanted


def _left(product: Supervised, worker: Worker) -> int:
    """Files that nobody needs."""
    with closing(JobStore(product.settings.database)) as store:
        known = {job.id for job in store.all()}
        without_job = [path for path in files_in(product.home / "jobs") if path.parent.name not in known]
        return len([*without_job, *files_in(product.temporary, worker.temporary)]) + pieces(product.home, store)


# Answers


def _unlike_an_error(answer: dict[str, Any], param: str | None = None) -> str | None:
    """What is wrong with the answer to a caller's mistake. param: the field that it has to name; None: any."""
    if "error" not in answer:
        return "no error"
    error = json.loads(answer["error"])
    if not is_of_the_caller(error):
        return f"no error of the caller's: {answer['error'][:300]}"
    name = error["param"]
    named = name is not None and (name in error["message"] or repr(name) in error["message"])
    if not named or param not in (None, name):
        return f"it does not name the field: {answer['error'][:300]}"
    return None


def _unlike_a_video(output: dict[str, Any]) -> str | None:
    """What is wrong with a job's output."""
    with av.open(io.BytesIO(base64.b64decode(output["video_base64"])), "r") as film:
        frames = sum(1 for _ in film.decode(video=0))
    return None if frames == output["frames"] > 0 else f"{output['frames']} frames are said, {frames} there"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50, help="under kills (%(default)s)")
    parser.add_argument("--kills", type=int, default=100, help="%(default)s")
    parser.add_argument("--malformed", type=int, default=1000, help="inputs (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--only", choices=["kills", "malformed"], help="one of the two")
    options = parser.parse_args()
    shown = partial(track, console=Console(stderr=True))
    proofs: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "malformed":
            where = Path(folder) / "kills"
            proofs["kills"] = under_kills(where, options.jobs, options.kills, options.seed, shown)
        if options.only != "kills":
            numbers = range(options.first, options.first + options.malformed)
            proofs["malformed"] = malformed(Path(folder) / "malformed", numbers, options.seed, shown)
    table = Table("", *proofs)
    for one in fields(Figures):
        table.add_row(one.name.replace("_", " "), *(str(getattr(figures, one.name)) for figures in proofs.values()))
    Console(width=160).print(table)
    if any(figures.wrong for figures in proofs.values()):
        raise SystemExit("A promise is broken.")


if __name__ == "__main__":
    main()
