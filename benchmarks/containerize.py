"""What does shipping the models cost: by `bentoml containerize` and a push, and by build_image.py and push_image.py?

    python -m benchmarks.containerize [--gb 0.25 0.5 1.5] [--rounds 3] [--output DIR]

Both ways send the same code and the same random models to one registry on loopback, one after the other, and again
after a line of the code has changed. What they share is there before: the base image and Python's packages, as layers
of podman's and in the registry; so only the models and the code are timed, and what each way does whatever their size.

Everything but the registry lies on a disk of its own, a file that is mounted: the scratch disk of a way is what that
has less free than when the way began, asked five times a second. What was sent is what the registry has more
afterwards. Memory is that of all processes of the way, added up. Just before, sha256sum reads the same models. On a
machine that does other work, the seconds of a processor say more than those of the clock; the registry's are not
among them.

Needs root and the tools of `make test-image`. Writes containerize.csv and containerize.svg, prints a table of medians.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.push_image import GB, MB, bytes_in, write_models
from tests.image.engine import Engine, copy_checkout
from tests.image.registries import registry

WAYS = {"plain": "bentoml containerize, podman push", "ours": "build_image.py, push_image.py"}
CHANGES = {"new": "a new image", "edited": "a line of code changed"}
PUBLISHED_GB = 254  # of models: 236 GiB
DISK_BYTES = 32 * GB  # at most: the file has holes where nothing was written
SAMPLE_SECONDS = 0.2
TABLE_WIDTH = 150  # characters


@dataclass(frozen=True)
class Cost:
    """Of an image by one way, in bytes and seconds; `_hashing`: of sha256sum."""

    way: str
    change: str
    models: int
    seconds: float
    seconds_hashing: float
    processor: float
    """Seconds of a processor."""
    processor_hashing: float
    scratch: int
    """The most beyond what the disk held before."""
    kept: int
    """What of that is still there at the end: with the plain way, the image."""
    sent: int
    resident: int


@contextmanager
def mounted_disk(folder: Path) -> Iterator[Path]:
    """A file system that nobody else writes to."""
    file, mount = folder / "disk.ext4", folder / "disk"
    with file.open("wb") as disk:
        disk.truncate(int(DISK_BYTES))
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", file], check=True)  # noqa: S607
    subprocess.run(["mount", "-o", "loop,discard", file, mount], check=True)  # noqa: S607
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)  # noqa: S607


class Measured:
    """What is taken while it is entered: seconds, those of a processor, the most bytes of a disk and of memory."""

    def __init__(self, disk: Path) -> None:
        self._disk, self._ended = disk, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._others = set(psutil.Process().children(recursive=True))  # the registry
        self.seconds = self.processor = 0.0
        self.scratch = self.kept = self.resident = 0

    def __enter__(self) -> "Measured":
        os.sync()
        self._began, self._used, self._computed = time.monotonic(), used(self._disk), computed()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.processor = time.monotonic() - self._began, computed() - self._computed
        self._ended.set()
        self._watcher.join()
        self.kept = used(self._disk) - self._used

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.scratch = max(self.scratch, used(self._disk) - self._used)
            self.resident = max(self.resident, sum(map(resident, self._processes())))

    def _processes(self) -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - self._others


def computed() -> float:
    """Seconds of a processor, of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def used(disk: Path) -> int:
    return shutil.disk_usage(disk).used


def resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


class Shipping:
    """The two ways, from a checkout, a store and podman's layers on `disk` to the registry `host`, with its folder."""

    def __init__(self, disk: Path, registry: Path, host: str) -> None:
        self.disk, self.registry = disk, registry
        self.home, self._checkout, self._host = disk / "home", disk / "checkout", host
        scratch = disk / "scratch"
        for folder in (self._checkout, scratch, disk / "engine"):
            folder.mkdir()
        self._variables = {"BENTOML_HOME": str(self.home), "TMPDIR": str(scratch)}
        self._engine = Engine.set_up(disk / "engine", disk / "storage", disk / "run")
        copy_checkout(self._checkout)

    def write_models(self, size: float) -> int:
        """New ones in the place of the last. Returns their bytes."""
        shutil.rmtree(self.home, ignore_errors=True)
        return write_models(self.home, size)

    def edit(self, line: str) -> None:
        with (self._checkout / "service.py").open("a") as source:
            source.write(f"# {line}\n")

    def hash(self) -> None:
        """Read the models as sha256sum does."""
        self._engine.run("sha256sum", *sorted((self.home / "models").rglob("*.safetensors")))

    def ship(self, way: str, tag: str) -> None:
        image, target = f"localhost/benchmark-{way}:{tag}", f"{self._host}/benchmark/{way}:{tag}"
        if way == "plain":
            self._run("bentoml", "build")
            self._run("bentoml", "containerize", "avatar-api:latest", "--backend", "podman", "--image-tag", image)
            self._run("podman", "push", "--quiet", "--tls-verify=false", image, target)
        else:
            self._run("python", "scripts/build_image.py", "--engine", "podman", "--tag", image)
            self._run("python", "scripts/push_image.py", image, target)

    def _run(self, *command: str) -> None:
        self._engine.run(*command, building=True, cwd=self._checkout, variables=self._variables)

    def forget(self, way: str, *tags: str) -> None:
        """Images that are not needed any more, on this machine."""
        self._engine.run("podman", "image", "rm", *(f"localhost/benchmark-{way}:{tag}" for tag in tags))
        self._engine.run("podman", "image", "prune", "--force")


@contextmanager
def prepared(folder: Path) -> Iterator[Shipping]:
    """Both ways, and what they share in its places."""
    with mounted_disk(folder) as disk, registry(folder / "registry") as host:
        shipping = Shipping(disk, folder / "registry", host)
        shipping.write_models(100 * MB)
        for way in WAYS:
            shipping.ship(way, "shared")
        yield shipping


def measure(shipping: Shipping, sizes: Sequence[float], rounds: int) -> Iterator[Cost]:
    """The two ways in turn, with models of each size, in GB, round by round."""
    for number, size in ((number, size) for number in range(1, rounds + 1) for size in sizes):
        models = shipping.write_models(size * GB)
        for way in WAYS:
            tags = {change: f"{change}-{number}-{models}" for change in CHANGES}
            for change, tag in tags.items():
                shipping.edit(f"{way} {tag}")
                with Measured(shipping.disk) as hashing:
                    shipping.hash()
                there = bytes_in(shipping.registry)
                with Measured(shipping.disk) as taken:
                    shipping.ship(way, tag)
                seconds = (taken.seconds, hashing.seconds, taken.processor, hashing.processor)
                sent = bytes_in(shipping.registry) - there
                yield Cost(way, change, models, *seconds, taken.scratch, taken.kept, sent, taken.resident)
            shipping.forget(way, *tags.values())


def median(costs: Iterable[Cost], what: Callable[[Cost], float]) -> float:
    return statistics.median(map(what, costs))


def of(costs: Sequence[Cost], way: str, change: str) -> dict[int, list[Cost]]:
    """By the models' bytes, the smallest first."""
    mine = [cost for cost in costs if (cost.way, cost.change) == (way, change)]
    return {models: [cost for cost in mine if cost.models == models] for models in sorted({it.models for it in mine})}


def line(costs: Sequence[Cost], way: str, change: str, what: Callable[[Cost], float]) -> tuple[float, float]:
    """The straight line nearest to the medians: what there is without models, and what each GB adds."""
    medians = {models / GB: median(group, what) for models, group in of(costs, way, change).items()}
    slope, start = np.polyfit(list(medians), list(medians.values()), 1)
    return float(start), float(slope)


FIGURES: dict[str, Callable[[Cost], float]] = {
    "seconds of a processor": lambda cost: cost.processor,
    "GB of scratch disk": lambda cost: cost.scratch / GB,
    "GB sent": lambda cost: cost.sent / GB,
}


def show(costs: Sequence[Cost], console: Console) -> None:
    header = ("GB of models", "", "", "s", "× sha256sum", "of a processor", "× sha256sum")
    table = Table(*header, "scratch GB", "kept GB", "sent MB", "MB resident")
    for change in CHANGES:
        for way in WAYS:
            for models, group in of(costs, way, change).items():
                table.add_row(
                    f"{models / GB:.2f}",
                    CHANGES[change],
                    WAYS[way],
                    f"{median(group, lambda cost: cost.seconds):.0f}",
                    f"{median(group, lambda cost: cost.seconds / cost.seconds_hashing):.1f}",
                    f"{median(group, lambda cost: cost.processor):.0f}",
                    f"{median(group, lambda cost: cost.processor / cost.processor_hashing):.1f}",
                    f"{median(group, lambda cost: cost.scratch / GB):.2f}",
                    f"{median(group, lambda cost: cost.kept / GB):.2f}",
                    f"{median(group, lambda cost: cost.sent / MB):.1f}",
                    f"{median(group, lambda cost: cost.resident / MB):.0f}",
                )
    console.print(table)
    table = Table("what a GB of models adds", *FIGURES, "× sha256sum", f"so {PUBLISHED_GB} GB would take")
    _, hashing = line(costs, "plain", "new", lambda cost: cost.processor_hashing)
    for change in CHANGES:
        for way in WAYS:
            lines = [line(costs, way, change, what) for what in FIGURES.values()]
            seconds, scratch, sent = (start + max(slope, 0) * PUBLISHED_GB for start, slope in lines)
            table.add_row(
                f"{CHANGES[change]}, {WAYS[way]}",
                *(f"{slope:.2f}" for _, slope in lines),
                f"{lines[0][1] / hashing:.1f}",
                f"{seconds / 3600:.2f} h of a processor, {scratch:.0f} GB of scratch disk, {sent:.0f} GB sent",
            )
    console.print(table)
    console.print(f"The last column is arithmetic with straight lines; {PUBLISHED_GB} GB have not been tried.")


def plot(costs: Sequence[Cost], path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    all_axes = figure.subplots(len(CHANGES), len(FIGURES), sharex=True, sharey="col")
    for row, (change, title) in enumerate(CHANGES.items()):
        for axes, (name, what) in zip(all_axes[row], FIGURES.items(), strict=True):
            for way, color, width in (("plain", "C1", 4), ("ours", "C0", 1.5)):  # one may lie on the other
                medians = {}
                for models, group in of(costs, way, change).items():
                    axes.plot(
                        [models / GB] * len(group), list(map(what, group)), ".", color=color, markersize=2 * width + 2
                    )
                    medians[models / GB] = median(group, what)
                axes.plot(list(medians), list(medians.values()), color=color, linewidth=width, label=WAYS[way])
            if row == 0:
                axes.set_title(name)
            else:
                axes.set_xlabel("GB of models")
        all_axes[row][0].set_ylabel(title)
    for axes in all_axes.flat:
        axes.set(xlim=(0, None), ylim=(0, None))
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.25, 0.5, 1.5], help="of models (0.25 0.5 1.5)")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="%(default)s")
    options = parser.parse_args()
    if len(set(options.gb)) < 2:
        parser.error("--gb: two sizes at least, so that the growth is seen")
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)  # in a log, too
    costs = []
    with tempfile.TemporaryDirectory() as folder, (options.output / "containerize.csv").open("w") as log:
        print(*(field.name for field in fields(Cost)), sep=",", file=log)
        console.print("Making the layers that both ways share …")
        with prepared(Path(folder)) as shipping:
            for cost in measure(shipping, options.gb, options.rounds):
                print(*astuple(cost), sep=",", file=log, flush=True)
                console.print(
                    f"{cost.models / GB:.2f} GB, {WAYS[cost.way]}, {CHANGES[cost.change]}: {cost.seconds:.0f} s, "
                    f"{cost.processor:.0f} of a processor (sha256sum: {cost.seconds_hashing:.0f}, "
                    f"{cost.processor_hashing:.1f}), {cost.scratch / GB:.2f} GB of scratch disk, "
                    f"{cost.sent / MB:.1f} MB sent"
                )
                costs.append(cost)
    plot(costs, options.output / "containerize.svg")
    show(costs, console)


if __name__ == "__main__":
    main()
