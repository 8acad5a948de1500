"""The whole service with models of the published size: what its user waits for on this GPU, and does it keep its word?

    python -m benchmarks.full_size FOLDER [SECTION ...]                  all sections but too_large
    python -m benchmarks.full_size FOLDER too_large --memory PRESET      of a card larger than this one

Writes the three snapshots as they lie on the hub, with random weights, into FOLDER (100 GB; /dev/shm does), imports
them as users do, runs `bentoml serve`, and asks for videos over HTTP. What is in FOLDER already stays, so sections can
be run one by one. Nothing is downloaded. Prints Markdown, each line when it is known; ends with 1 if a promise is
broken. `--tiny --sizes 64x64 96x96` shows without a GPU that everything runs.
"""

import argparse
import hashlib
import io
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import soundfile
import torch

from avatar_api.jobs import FINISHED
from benchmarks.markdown import row, table
from scripts import make_tiny_snapshots as snapshots
from tests.conftest import REPOSITORY, import_runtime
from tests.served import Served

GB = 1e9
PUBLISHED = {
    "DIM": 5120, "HEADS": 40, "FFN_DIM": 13824, "LAYERS": 40,
    "TEXT_DIM": 4096, "TEXT_HEADS": 64, "TEXT_FFN_DIM": 10240, "TEXT_LAYERS": 24, "TEXT_VOCABULARY": 256384,
    "IMAGE_DIM": 1280, "IMAGE_LAYERS": 32, "IMAGE_OUT": 1024,
    "CAPTION_DIM": 1024, "CAPTION_LAYERS": 24, "CAPTION_VOCABULARY": 250002, "VAE_DIM": 96,
    "SPEECH_DIM": 768, "SPEECH_FFN_DIM": 3072, "SPEECH_CHANNELS": 512, "CODE_DIM": 256,
    "AUDIO_HIDDEN": 512, "AUDIO_DIM": 768,
}  # fmt: skip
"""The sizes in scripts/make_tiny_snapshots.py's own comments."""
WRITERS = 5  # files at a time: each is drawn in memory before it is written
PATIENCE = 3600  # seconds that a video may take
TWO_CLIPS = 81 + 72  # frames
PICTURE, TWO_PEOPLE = (REPOSITORY / "examples" / name for name in ("portrait.png", "two_people.jpg"))


class Bench(NamedTuple):
    folder: Path
    served: Served
    sizes: list[str]
    """The first is that of most videos."""
    steps: int


@contextmanager
def timed(what: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    print(f"{what} in {time.perf_counter() - begun:.1f} s", flush=True)


# The models.


def draw(seed: int, file: str, layout: snapshots.Layout, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """As make_tiny_snapshots draws them, in a third of the time."""
    torch.manual_seed(zlib.crc32(f"{seed} {file} {min(layout)}".encode()))
    tensors = {}
    for name, shape in layout.items():
        mean, deviation = snapshots.mean_and_deviation(name, shape)
        tensors[name] = torch.empty(shape).normal_(mean, deviation).to(dtype)
    return tensors


def writers(folder: Path) -> list[Callable[[], object]]:
    """Of each file, what writes it; the largest first."""
    wan, speech, audio = (folder / name for name in snapshots.SNAPSHOTS)
    return [
        partial(snapshots.write_t5, wan, 0),
        *(partial(snapshots.write_shard, wan, 0, shard) for shard in range(snapshots.SHARDS)),
        *(partial(snapshots.write_audio_branch, audio, 0, people) for people in ("single", "multi")),
        partial(snapshots.write_clip, wan, 0),
        partial(snapshots.write_vae, wan, 0),
        partial(snapshots.write_wav2vec2, speech, 0),
        partial(snapshots.write_wan_configs, wan),
    ]


def write_file(folder: Path, number: int) -> None:
    """One of them, in a process of its own."""
    torch.set_num_threads(1)
    for name, value in PUBLISHED.items():
        setattr(snapshots, name, value)
    snapshots.draw = draw
    writers(folder)[number]()


def write(folder: Path, tiny: bool) -> None:
    if tiny:
        snapshots.main([str(folder)])
        return
    for name in snapshots.SNAPSHOTS:
        (folder / name).mkdir(parents=True)
    with ProcessPoolExecutor(WRITERS, get_context("spawn")) as pool:
        list(pool.map(partial(write_file, folder), range(len(writers(folder)))))


# Videos over HTTP.


def voice(frames: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(frames).normal(0, 0.1, frames * 640)
    soundfile.write(file, noise, 16000, format="WAV")
    return file.getvalue()


def ask(bench: Bench, speakers: int = 1, frames: int = 75, **values: object) -> str:
    """Order a video; its id."""
    files = {"input_reference": (TWO_PEOPLE if speakers == 2 else PICTURE).read_bytes(), "audio": voice(frames)}
    if speakers == 2:
        files["audio_2"] = voice(frames + 1)
    data = {"prompt": "A person talks.", "size": bench.sizes[0], "steps": bench.steps} | values
    answer = httpx.post(f"{bench.served.url}/v1/videos", data=data, files=files, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["id"])


def wait(bench: Bench, video: str, until: Callable[[dict[str, Any]], bool]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not until(now := httpx.get(f"{bench.served.url}/v1/videos/{video}", timeout=60).json()):
        if now["status"] in FINISHED or time.monotonic() > give_up:
            raise SystemExit(f"{video} did not get there: {now}\n{bench.served.log[-8000:]}")
        time.sleep(0.1)


def finish(bench: Bench, video: str) -> tuple[str, dict[str, float]]:
    """The finished video's sha256, and what its stages took."""
    wait(bench, video, lambda now: now["status"] == "completed")
    content = httpx.get(f"{bench.served.url}/v1/videos/{video}/content", timeout=60)
    content.raise_for_status()
    result = bench.served.store.get(video).result
    assert result is not None
    return hashlib.sha256(content.content).hexdigest(), result["timings"]


def metric(bench: Bench, name: str) -> float:
    """What /metrics says of it, all labels together."""
    lines = httpx.get(f"{bench.served.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def memory(bench: Bench) -> str:
    kinds = ("allocated", "reserved", "total")
    allocated, reserved, total = (metric(bench, f"avatar_gpu_memory_{kind}_bytes") / GB for kind in kinds)
    runner = bench.served.process("avatar_runner").memory_info().rss / GB
    return f"{allocated:.1f}, {reserved:.1f} of {total:.1f}; runner {runner:.1f}"


# The sections.


def video(bench: Bench) -> bool:
    """Two clips, and the same again."""
    contents = []
    for again in ("first", "again"):
        before, begun = _steps(bench), time.perf_counter()
        content, timings = finish(bench, ask(bench, frames=TWO_CLIPS))
        seconds = time.perf_counter() - begun
        took, count = (after - earlier for after, earlier in zip(_steps(bench), before, strict=True))
        row(f"a video of two clips, {again}", seconds, f"a step {took / max(1, count):.2f}; {timings}")
        contents.append(content)
    row("GPU memory: allocated, reserved of all, GB; resident, GB", "", memory(bench))
    same = contents[0] == contents[1]
    row("the same bytes", "", same)
    _undisturbed(bench).write_text(contents[0])
    return same


def _steps(bench: Bench) -> tuple[float, float]:
    """The seconds of all steps so far, and how many there were."""
    return metric(bench, "avatar_step_seconds_sum"), metric(bench, "avatar_step_seconds_count")


def _undisturbed(bench: Bench) -> Path:
    """Holds the sha256 of that video, for `killed`, which may be run later."""
    return bench.folder / f"sha256-{bench.sizes[0]}-{bench.steps}"


def killed(bench: Bench) -> bool:
    """The runner is killed with -9 in the second clip."""
    if not _undisturbed(bench).exists():
        raise SystemExit("There is no undisturbed video yet to compare with: run the section video first.")
    begun = time.perf_counter()
    video = ask(bench, frames=TWO_CLIPS)
    wait(bench, video, lambda now: now["clip"] == 2)
    bench.served.kill("avatar_runner")
    kill = time.perf_counter()
    wait(bench, video, lambda now: now["stage"] != "generating")
    bench.served.wait_until_ready()
    row("killed in the second clip: until it is ready again", time.perf_counter() - kill, "")
    content, _ = finish(bench, video)
    same = content == _undisturbed(bench).read_text()
    row("the whole of that video, to the undisturbed one's bytes", time.perf_counter() - begun, same)
    return same


def cancelled(bench: Bench) -> bool:
    """In the middle of a step."""
    video = ask(bench, steps=40)
    wait(bench, video, lambda now: now["step"] is not None)
    time.sleep(1)
    begun = time.perf_counter()
    httpx.post(f"{bench.served.url}/v1/videos/{video}/cancel", timeout=60).raise_for_status()
    wait(bench, video, lambda now: now["status"] == "cancelled")
    row("cancelled after", time.perf_counter() - begun, "")
    return True


def sizes(bench: Bench) -> bool:
    """A clip of two speakers in the larger sizes."""
    for size in bench.sizes[1:]:
        begun = time.perf_counter()
        _, timings = finish(bench, ask(bench, 2, size=size, steps=1))
        row(f"two speakers, {size}, a clip of one step", time.perf_counter() - begun, f"{timings}; {memory(bench)}")
    return True


def too_large(bench: Bench) -> bool:
    """The largest video gets less on the GPU, and the next one what was usual."""
    size, begun = bench.sizes[-1], time.perf_counter()
    finish(bench, ask(bench, 2, size=size, steps=1, text_guidance=1))
    fell_back = "too large for the GPU; once more with preset" in bench.served.log
    row(f"two speakers, {size}, a clip of one step with two passes", time.perf_counter() - begun, memory(bench))
    row("it was tried with less on the GPU", "", fell_back)
    begun = time.perf_counter()
    finish(bench, ask(bench, steps=1))
    row("the next one, with what is usual loaded again", time.perf_counter() - begun, memory(bench))
    return fell_back


USUAL = {section.__name__: section for section in (video, killed, cancelled, sizes)}
SECTIONS = USUAL | {"too_large": too_large}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--memory", help="a preset; by the GPU's memory if not given")
    parser.add_argument("--sizes", nargs="+", default=["640x640", "960x960", "1280x1280"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=2, help="of the videos (2)")
    parser.add_argument("--tiny", action="store_true", help="the tiny models")
    options = parser.parse_intermixed_args()
    folder: Path = options.folder
    if not (folder / "snapshots").exists():
        with timed("The models are written"):
            write(folder / "snapshots", options.tiny)
    if not (folder / "bentoml").exists():
        with timed("They are imported"):
            import_runtime(folder / "snapshots", folder / "bentoml")
    size = sum(file.stat().st_size for file in (folder / "bentoml" / "models").rglob("*") if file.is_file())
    print(f"{size / GB:.3g} GB", flush=True)

    home = folder / f"home-{options.memory or 'usual'}"
    environment = {"OMP_NUM_THREADS": str(os.cpu_count())}
    placed = {} if options.memory is None else {"memory": options.memory}
    served = Served(home, bento_home=folder / "bentoml", environment=environment, **placed)
    begun = time.perf_counter()
    kept = True
    with served:
        bench = Bench(folder, served, options.sizes, options.steps)
        ready = time.perf_counter() - begun
        for line in served.log.splitlines():
            if "start: " in line or "Models loaded" in line:
                print(line, flush=True)
        table("", "s", "")
        row("served: until /ping says 200", ready, "")
        for name in options.sections or USUAL:
            kept &= SECTIONS[name](bench)
        begun = time.perf_counter()
    row("stopped", time.perf_counter() - begun, "")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
