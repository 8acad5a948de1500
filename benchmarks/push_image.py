"""What does pushing cost beside reading the models once? scripts/push_image.py against sha256sum of the same bytes.

    python benchmarks/push_image.py [--gb 1.5] [--rounds 5] [--output DIR]

Three models of random bytes and a small code image go to Debian's docker-registry on loopback (apt install
docker-registry). Every round takes both times, one after the other, with the files in the page cache; the ratio that
counts is the median of the rounds' own. Then the same image again, and the image with other code. The bounds are what
we promise: a first push takes at most 1.3 times sha256sum, 200 MB of memory and scratch disk of 1 % of the models; an
unchanged one 2 s and 100 kB; new code sends no byte of a model. Writes push_image.svg.
"""

import argparse
import dataclasses
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from models import store
from tests.conftest import REPOSITORY
from tests.image.registries import Proxy, registry, tar_of, write_code_image

GB, MB = 1e9, 1e6
SHARES = {  # of the bytes, much as the published ones
    "wan2.1-i2v-14b-480p": [0.06] * 5,
    "chinese-wav2vec2-base": [0.01],
    "infinitetalk": [0.04, 0.04] + [0.0875] * 7,
}
SAMPLE_SECONDS = 0.02
MOST = {"ratio": 1.3, "memory": 200 * MB, "scratch": 0.01, "again": 2.0, "again bytes": 100e3}


@dataclass
class Run:
    """A process: seconds, those of a processor, the most resident memory, the most bytes in its scratch folders."""

    seconds: float
    processor: float
    resident: int
    scratch: int


def write_models(home: Path, size: float) -> int:
    """Random files in the store under `home`. Returns their bytes."""
    os.environ["BENTOML_HOME"] = str(home)
    (home / "models").mkdir(parents=True)
    total = 0
    for name, shares in SHARES.items():
        model = store.Model(name, "0123456789ab", f"owner/{name}", None, None, "full", ())
        store.begin(model)
        files = []
        for number, share in enumerate(shares):
            file = model.staging / f"model-{number:05d}.safetensors"
            with file.open("wb") as content:
                for _ in range(round(size * share / MB)):
                    content.write(random.randbytes(int(MB)))  # noqa: S311 - no secret
            files.append(store.File(file.name, file.stat().st_size, store.sha256(file)))
            total += files[-1].size
        store.register(dataclasses.replace(model, files=tuple(files)))
    return total


def run(command: list[str], scratch: list[Path]) -> Run:
    """Run a command to its end."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ended, resident, most = threading.Event(), 0, 0

    def watch() -> None:
        nonlocal resident, most
        while not ended.wait(SAMPLE_SECONDS):
            resident = max(resident, peak_resident_bytes(process.pid))
            most = max(most, sum(map(bytes_in, scratch)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    return Run(seconds, usage.ru_utime + usage.ru_stime, resident, most)


def peak_resident_bytes(process: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def bytes_in(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def code_image(file: Path, source: bytes) -> str:
    """A base of 10 MB that stays, and the code."""
    base = tar_of({"home": None, "usr/lib/base": random.Random(0).randbytes(int(10 * MB))})  # noqa: S311 - no secret
    config = {"config": {"Env": ["PATH=/usr/bin"]}}
    return write_code_image(file, [base, tar_of({"home/bentoml/bento/src/service.py": source})], config)


def measure(
    folder: Path, size: float, rounds: int, console: Console
) -> tuple[int, list[Run], list[Run], list[tuple[Run, int]]]:
    """Returns the models' bytes; the runs of sha256sum and the first pushes; run and bytes sent of the two others."""
    home, scratch = folder / "home", folder / "scratch"
    console.print(f"Writing {size / GB:g} GB of random bytes …")
    total = write_models(home, size)
    files = sorted(str(path) for path in (home / "models").rglob("*.safetensors"))
    code, newer = code_image(folder / "code.tar", b"print(1)"), code_image(folder / "newer.tar", b"print(2)")
    scratch.mkdir()
    os.environ |= {"TMPDIR": str(scratch), "DOCKER_CONFIG": str(folder), "XDG_RUNTIME_DIR": str(folder)}
    push = [sys.executable, str(REPOSITORY / "scripts" / "push_image.py")]
    sums, firsts, others = [], [], []
    for number in range(rounds):
        with registry(folder / f"registry-{number}") as host:
            (home / "push" / "digests.json").unlink(missing_ok=True)
            os.sync()
            sums.append(run(["/usr/bin/sha256sum", *files], []))
            firsts.append(run([*push, code, f"{host}/me/avatar:v1"], [scratch, home / "push"]))
            ratio = firsts[-1].seconds / sums[-1].seconds
            console.print(
                f"round {number + 1}: {sums[-1].seconds:.2f} s, {firsts[-1].seconds:.2f} s, ratio {ratio:.2f}"
            )
            if number == rounds - 1:
                for image, tag in ((code, "v1"), (newer, "v2")):
                    with Proxy(host) as proxy:
                        again = run([*push, image, f"{proxy.host}/me/avatar:{tag}"], [scratch, home / "push"])
                        others.append((again, proxy.sent + proxy.sent_back))
        subprocess.run(["/bin/rm", "-rf", folder / f"registry-{number}"], check=True)
    return total, sums, firsts, others


def plot(sums: list[Run], firsts: list[Run], others: list[tuple[Run, int]], total: int, path: Path) -> None:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    rows = {
        "sha256sum": [run.seconds for run in sums],
        "first push": [run.seconds for run in firsts],
        "pushed again": [others[0][0].seconds],
        "new code": [others[1][0].seconds],
    }
    for number, (name, seconds) in enumerate(rows.items()):
        axes.barh(number, statistics.median(seconds), color="C0" if name == "sha256sum" else "C1")
        axes.plot(seconds, [number] * len(seconds), "k.", markersize=4)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(xlabel=f"seconds, {total / GB:.2f} GB of models, docker-registry on loopback; bar: median, dots: runs")
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.5, help="of models (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="%(default)s")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        total, sums, firsts, others = measure(Path(folder), options.gb * GB, options.rounds, console)
    options.output.mkdir(parents=True, exist_ok=True)
    plot(sums, firsts, others, total, options.output / "push_image.svg")

    ratio = statistics.median(push.seconds / read.seconds for push, read in zip(firsts, sums, strict=True))
    memory = max(run.resident for run in firsts)
    scratch = max(run.scratch for run in firsts)
    (again, again_sent), (newer, newer_sent) = others
    table = Table("", "seconds", "of a processor", "on the wire", "bound")
    for name, runs, wire, bound in (
        ("sha256sum", sums, "", ""),
        ("first push", firsts, f"{total / MB:.0f} MB", f"{MOST['ratio']} × sha256sum: {ratio:.2f}"),
        ("pushed again", [again], f"{again_sent / 1e3:.1f} kB", "2 s, 100 kB"),
        ("new code", [newer], f"{newer_sent / 1e3:.1f} kB", "no model"),
    ):
        seconds = statistics.median(run.seconds for run in runs)
        processor = statistics.median(run.processor for run in runs)
        table.add_row(name, f"{seconds:.2f}", f"{processor:.2f}", wire, bound)
    console.print(table)
    console.print(f"At most {memory / MB:.0f} MB resident and {scratch / 1e3:.1f} kB of scratch disk")
    kept = {
        "ratio": ratio <= MOST["ratio"],
        "memory": memory <= MOST["memory"],
        "scratch": scratch <= MOST["scratch"] * total,
        "again": again.seconds <= MOST["again"],
        "again bytes": again_sent <= MOST["again bytes"],
        "new code": newer_sent <= MOST["again bytes"],
    }
    for name in (name for name, kept_it in kept.items() if not kept_it):
        console.print(f"Not kept: {name}")
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
