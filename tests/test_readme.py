"""What the README shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import av

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_python_example_makes_a_video(snapshots: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    assert 'Path("DIR")' in example
    assert "steps=4" in example
    program = example.replace('Path("DIR")', f'Path("{snapshots}")').replace("steps=4", "steps=1, max_frames=5")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    with av.open(str(tmp_path / "out" / "video.mp4")) as video:
        assert (video.streams.video[0].frames, video.streams.audio[0].rate) == (5, 48000)


def test_all_files_that_are_named_are_there() -> None:
    linked = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", README)
    named = [*linked, *re.findall(r"python ((?:scripts|models)/[\w/.]+)", README)]
    assert len(named) > 15
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_all_make_targets_that_are_named_are_there() -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"^ {4}make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test", "test-image"} <= named <= set(targets)
