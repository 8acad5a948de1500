"""What several tests share: the golden cases, tiny snapshots written once, and a pipeline on each."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from infinitetalk.pipeline import InfiniteTalkPipeline

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine OpenMP's threads wait for each other most of the time
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads must not take the other tests' core

REPOSITORY = Path(__file__).parent.parent
GOLDENS = REPOSITORY / "tests" / "goldens"


def pytest_configure() -> None:
    """Settings of whoever runs the tests, such as the Makefile's for the demo, are not the tests'."""
    for name in list(os.environ):
        if name.startswith(("AVATAR_", "AWS_")) and not name.startswith("AVATAR_TEST_"):
            del os.environ[name]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in the background


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the three snapshots in their published layout, with tiny random weights."""
    folder = tmp_path_factory.mktemp("models") / "snapshots"
    subprocess.run([sys.executable, REPOSITORY / "scripts" / "make_tiny_snapshots.py", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def bento_home(snapshots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the snapshots in it, put there as users do."""
    home = tmp_path_factory.mktemp("bentoml")
    import_runtime(snapshots, home)
    return home


def import_runtime(snapshots: Path, bento_home: Path) -> None:
    command = [sys.executable, "models/import_models.py", "--source", str(snapshots), "--profile", "runtime"]
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "BENTOML_HOME": str(bento_home)}, check=True)


@pytest.fixture(scope="session")
def tiny_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny transformer: of rank 2, and of a norm the whole difference."""
    import torch
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer, outputs, inputs in (("self_attn.q", 64, 64), ("cross_attn.v", 64, 64), ("ffn.0", 128, 64)):
        for block in range(2):
            name = f"diffusion_model.blocks.{block}.{layer}"
            tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
    tensors["diffusion_model.blocks.1.norm3.diff"] = torch.randn(64, generator=generator)
    file = tmp_path_factory.mktemp("loras") / "tiny.safetensors"
    save_file(tensors, file)
    file.chmod(0o644)  # for the image's own user, too
    file.parent.chmod(0o755)
    return file


@pytest.fixture(scope="session")
def pipeline(snapshots: Path) -> "InfiniteTalkPipeline":
    from infinitetalk.pipeline import InfiniteTalkPipeline  # takes seconds, which not every test needs

    return InfiniteTalkPipeline.from_snapshots(
        snapshots / "Wan2.1-I2V-14B-480P", snapshots / "InfiniteTalk", snapshots / "chinese-wav2vec2-base", "cpu"
    )


@dataclass
class SmallDisk:
    """A file system of 8 MB."""

    folder: Path

    def fill(self) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))

    def make_room(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield SmallDisk(folder)
    subprocess.run(["/bin/umount", "--lazy", folder], check=True)
