"""Print what building and pushing the image takes, as the tables of docs/BUILDING.md: disk, time and money.

python scripts/image_costs.py            of the models in the store, by their locks
python scripts/image_costs.py --guide    of the published sizes, 77, 1.5 and 158 GiB
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder

from container.checks import CODE_IMAGE_BYTES
from container.errors import ImageError
from container.layers import read_store

GB, GIB = 1e9, 2**30
GUIDE = {"Wan2.1-I2V-14B-480P": 77 * GIB, "chinese-wav2vec2-base": 1.5 * GIB, "InfiniteTalk": 158 * GIB}
"""The guide's sizes. Its GB are GiB: the files are 254 of the GB that disks and networks are sold by."""

PLAIN_SCRATCH = 5.0
"""`bentoml containerize` by podman: peak of extra disk, in bytes per byte of models: benchmarks/containerize.py."""
GZIP_RATE = 34e6
"""Bytes a second that gzip, which plain containerize sends the models through, takes in. Measured on one core."""
HASH_RATE = 300e6
"""Bytes a second that one core hashes while sending."""

BUILD_HOURS = 0.5  # the code image: an estimate, mostly of downloading torch's CUDA libraries
VM_DOLLARS = 0.09  # an hour, of 8 cores with 500 GB; the guide's figure
HUB_DOLLARS = 5.0  # a month, of Docker Hub's smallest paid plan; the guide's figure


@dataclass(frozen=True)
class Image:
    models: float
    code: float
    """Bytes, of the layers above the models."""

    @property
    def size(self) -> float:
        return self.models + self.code

    def import_hours(self, megabits: float) -> float:
        return hours(self.models, megabits)

    def push_hours(self, megabits: float) -> float:
        """As fast as the network or one core's sha256."""
        return max(hours(self.size, megabits), self.size / HASH_RATE / 3600)

    def vm_hours(self, down: float, up: float) -> float:
        return self.import_hours(down) + BUILD_HOURS + self.push_hours(up)

    def vm_dollars(self, down: float, up: float) -> float:
        return self.vm_hours(down, up) * VM_DOLLARS


def hours(size: float, megabits: float) -> float:
    return size * 8 / (megabits * 1e6) / 3600


def disk_table(sizes: Mapping[str, float], image: Image) -> str:
    plain = image.models * (1 + PLAIN_SCRATCH)
    rows = [f"| {name} | {size / GB:,.1f} GB | |" for name, size in sizes.items()]
    rows += [
        f"| models in the store | {image.models / GB:,.1f} GB | {image.models / GB:,.1f} GB |",
        f"| scratch of the build | {CODE_IMAGE_BYTES / GB:,.0f} GB | {image.models * PLAIN_SCRATCH / GB:,.0f} GB |",
        f"| **in all** | **{(image.models + CODE_IMAGE_BYTES) / GB:,.0f} GB** | **{plain / GB:,.0f} GB** |",
        f"| the image | {image.size / GB:,.0f} GB | {image.size / GB:,.0f} GB |",
    ]
    return "\n".join(["| disk | build_image, push_image | bentoml containerize |", "|---|---|---|", *rows])


def time_table(image: Image) -> str:
    rows = [
        f"| {megabits:,} Mbit/s | {image.import_hours(megabits):.1f} h | {image.push_hours(megabits):.1f} h "
        f"| {image.vm_hours(megabits, megabits):.1f} h | ${image.vm_dollars(megabits, megabits):.2f} |"
        for megabits in (100, 500, 1000)
    ]
    header = (
        f"| network | import | push | in all, with {BUILD_HOURS:g} h of building | machine at ${VM_DOLLARS:.2f}/h |"
    )
    return "\n".join([header, "|---|---|---|---|---|", *rows])


def tables(sizes: Mapping[str, float], code: float) -> str:
    image = Image(sum(sizes.values()), code)
    gzip = image.models / GZIP_RATE / 3600
    return "\n\n".join(
        [
            disk_table(sizes, image),
            time_table(image),
            f"`bentoml containerize` adds {gzip:.1f} h of gzip to each build, and every change of the code uploads the "
            f"models again. Docker Hub: ${HUB_DOLLARS:.0f} a month.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guide", action="store_true", help="without a store: of the published sizes")
    options = parser.parse_args(arguments)
    sizes = GUIDE
    if not options.guide:
        try:
            models = read_store()
        except ImageError as error:
            print(f"error: {error}; or --guide", file=sys.stderr)
            return 2
        sizes = {model.name: sum(entry["size"] for entry in model.lock["files"].values()) for model in models}
    print(tables(sizes, code=9 * GB))
    return 0


if __name__ == "__main__":
    sys.exit(main())
