"""Push the image: the code image, and the models of the store below it, to a registry or into a file.

    python scripts/push_image.py avatar-api:latest docker.io/me/avatar-api:v1.0
    python scripts/push_image.py avatar-api:latest docker.io/me/avatar-api:v1.0 --dry-run --bandwidth 500
    python scripts/push_image.py avatar-api:latest oci:DIR                # no registry: a folder in the OCI layout
    python scripts/push_image.py avatar-api:latest docker-archive:FILE    # or a file for `docker load`

The code image is one of podman's or docker's, made by scripts/build_image.py, or oci:DIR, or docker-archive:FILE. The
models are read from the store ($BENTOML_HOME) as they are sent; nothing of them is written to the disk. Stopped at any
moment, the same command goes on where it was. `docker login` or `podman login` says who you are. docs/PUSHING.md says
more.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

from rich.filesize import decimal
from rich.progress import TaskID
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder

from container.code_image import open_source
from container.content import sha256_of
from container.digests import Digests
from container.errors import ImageError
from container.layers import Layer, read_store
from container.outputs import RegistryOutput, open_output
from container.push import LIMITS, Row, Survey, check_limits, push, survey_image
from models.console import byte_progress, console, leave, say

OVERHEAD = 1.02  # of what goes over the wire: TLS, TCP and HTTP


def show(survey: Survey, bandwidth: float) -> None:
    """The layers, bottom first; what is there, what would be sent, and how long that takes at `bandwidth` Mbit/s."""
    table = Table("layer", "size", "digest", "there", "time", title="from the bottom up")
    for row in survey.rows:
        digest = row.digest.removeprefix("sha256:")[:12] if row.digest else "when read"
        takes = "" if row.there else duration(seconds(row.size, bandwidth))
        table.add_row(row.name, decimal(row.size), digest, "yes" if row.there else "no", takes)
    console.print(table)
    size, missing = sum(row.size for row in survey.rows), sum(row.size for row in survey.missing)
    say(
        f"{len(survey.rows)} layers, {decimal(size)}: {decimal(size - missing)} there already, {decimal(missing)} to "
        f"send, {duration(seconds(missing, bandwidth))} at {bandwidth:g} Mbit/s"
    )
    most, reason = LIMITS["ghcr.io"]
    if large := [row.name for row in survey.rows if row.size > most]:
        say(f"{reason}, and Docker Hub takes them: {', '.join(large)}")


def seconds(size: int, bandwidth: float) -> float:
    return size * 8 / (bandwidth * 1e6) * OVERHEAD


def duration(time: float) -> str:
    hours, rest = divmod(round(time), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Bars:
    """Bytes, rate and time left: of every layer under way, and of all."""

    def __init__(self, survey: Survey) -> None:
        self.progress = byte_progress(disable=not survey.missing)
        self._all = self.progress.add_task("all", total=sum(row.size for row in survey.missing))
        self._tasks: dict[str, TaskID] = {}
        self._arrived: dict[str, int] = {}
        self._shown = 0.0
        self._lock = threading.Lock()

    def report(self, row: Row, position: int) -> None:
        """`position`: bytes of the layer that have arrived. The bars move ten times a second."""
        with self._lock:
            ended, self._arrived[row.name] = self._arrived.get(row.name) == row.size, position
            whole, now = position == row.size, time.monotonic()
            if now - self._shown < 0.1 and not whole and row.name in self._tasks:
                return
            self._shown = now
            if row.name not in self._tasks:
                self._tasks[row.name] = self.progress.add_task(row.name, total=row.size)
            self.progress.update(self._tasks[row.name], completed=position, visible=not whole)
            self.progress.update(self._all, completed=sum(self._arrived.values()))
        if whole and not ended and not console.is_terminal:  # in a log no bar moves
            say(f"{row.name}  {decimal(row.size)}")


def push_image(options: argparse.Namespace) -> None:
    digests = Digests()
    output = open_output(options.target, digests)
    survey = survey_image(read_store(), open_source(options.code_image), output, digests)
    if isinstance(output, RegistryOutput):
        check_limits(output.registry.reference, survey.rows)
    if options.dry_run:
        show(survey, options.bandwidth)
        if isinstance(output, RegistryOutput):
            output.registry.check_push()
            say(f"You may push to {output.registry.reference}.")
        return
    bars = Bars(survey)
    with bars.progress:
        _, manifest = push(survey, output, digests, options.replace, bars.report)
    models = sum(row.size for row in survey.rows if isinstance(row.source, Layer))
    size = sum(row.size for row in survey.rows)
    say(f"{options.target}: {decimal(size)}, {decimal(models)} of it models, digest {sha256_of(manifest)}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when pushed, 2 when that is not possible, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code_image", metavar="CODE_IMAGE", help="an image's name, oci:DIR or docker-archive:FILE")
    parser.add_argument("target", metavar="TARGET", help="[HOST/]REPOSITORY[:TAG], oci:DIR or docker-archive:FILE")
    parser.add_argument("--replace", action="store_true", help="move a tag that has another image now")
    parser.add_argument("--dry-run", action="store_true", help="send nothing; show what would be sent")
    parser.add_argument(
        "--bandwidth", type=float, default=100, metavar="MBIT", help="Mbit/s, for --dry-run (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if not options.bandwidth > 0:
        parser.error(f"--bandwidth {options.bandwidth:g}: it is more than 0 Mbit/s")
    try:
        push_image(options)
    except ImageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.target}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    leave(main())  # what has arrived at the registry is known
