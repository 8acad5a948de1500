"""What build_image.py --check finds before anything long starts, and the tables of what it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from container import checks
from container.errors import ImageError
from container.layers import read_store
from models.import_models import main as import_models
from scripts.image_costs import GIB, GUIDE, HUB_DOLLARS, Image, tables
from tests.conftest import REPOSITORY
from tests.small_hub import SmallHub

TOKEN = "hf_" + 34 * "x"


def check(home: Path, *options: str, **variables: str) -> str:
    """What --check prints; it must find something that would stop the work."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "build_image.py", "--check", *options],
        env={**inherited, "BENTOML_HOME": str(home), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def store(snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "store"))
    assert import_models(["--source", str(snapshots), "--profile", "runtime"]) == 0
    return tmp_path / "store"


def engine(folder: Path, script: str) -> str:
    """A PATH on which podman is a program that does what the script says, and nothing else is."""
    folder.mkdir(exist_ok=True)
    (folder / "podman").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "podman").chmod(0o755)
    return str(folder)


def test_an_arm_mac_is_told_where_to_build() -> None:
    with pytest.raises(ImageError, match=r"This is an ARM Mac.*x86_64: build it on a cloud machine or a self-hosted"):
        checks.architecture("arm64", "Darwin")
    with pytest.raises(ImageError, match="This is a machine of aarch64"):
        checks.architecture("aarch64", "Linux")
    assert "x86_64" in checks.architecture("x86_64", "Linux")


def test_too_small_a_disk_is_named_with_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=rf"No space for the models: {tmp_path} has \d+ GB free and 1000000 GB are"):
        checks.space(tmp_path, 1e15, "the models")
    assert "free" in checks.space(tmp_path, 1, "the models")


def test_a_missing_engine_is_named_with_what_installs_one(store: Path, tmp_path: Path) -> None:
    assert "✗ Neither podman nor docker is installed: apt-get install podman" in check(store, PATH=str(tmp_path))
    said = check(store, "--engine", "docker", PATH=engine(tmp_path / "bin", "true"))
    assert "✗ --engine docker: it is not installed; podman is." in said


def test_an_engine_that_is_there_but_runs_nothing_is_told_from_one_that_works(store: Path, tmp_path: Path) -> None:
    said = check(store, PATH=engine(tmp_path / "bin", "echo 'Cannot connect to the daemon' >&2; exit 125"))
    assert "✗ podman is installed and cannot run a container (Cannot connect to the daemon): make `podman run" in said


def test_all_that_is_wrong_is_said_at_once_beside_what_is_right(store: Path, tmp_path: Path) -> None:
    said = check(store, "--profile", "full", PATH=str(tmp_path))
    assert "✓ x86_64" in said
    assert "✗ --profile full: the store has " in said and "wan2.1-i2v-14b-480p (runtime)" in said
    assert "BENTOML_HOME=DIR python models/import_models.py --profile full" in said
    assert "✗ Neither podman nor docker" in said
    assert said.endswith("2 of these would stop the work: mend them, and check again.\n")


def test_the_models_profile_is_said(store: Path) -> None:
    assert "3 models in the store" in checks.profile(read_store(), "runtime")
    assert checks.profile(read_store(), None).endswith("profile runtime")


def test_models_that_are_not_imported_are_looked_for_on_the_hub(snapshots: Path, tmp_path: Path) -> None:
    hub = SmallHub()
    for repository in ("Wan-AI/Wan2.1-I2V-14B-480P", "TencentGameMate/chinese-wav2vec2-base", "MeiGen-AI/InfiniteTalk"):
        hub.add(repository, snapshots / repository.split("/")[1])
    with hub.running():
        given = {"HF_ENDPOINT": hub.url, "PATH": str(tmp_path)}
        said = check(tmp_path / "store", **given)
        assert "✗ " in said and "has no wan2.1-i2v-14b-480p: python models/import_models.py" in said
        assert "✓ the hub hands out all models, without an HF_TOKEN" in said
        assert "The token in HF_TOKEN is not valid (401)" in check(tmp_path / "store", HF_TOKEN=TOKEN, **given)
        hub.repositories["MeiGen-AI/InfiniteTalk"].gated = True
        assert "✗ MeiGen-AI/InfiniteTalk" in check(tmp_path / "store", **given)
        del hub.repositories["MeiGen-AI/InfiniteTalk"]
        said = check(tmp_path / "store", **given)
        assert "✗ MeiGen-AI/InfiniteTalk" in said and "set HF_TOKEN" in said


def test_a_full_disk_in_mid_build_is_told_from_other_failures() -> None:
    full = checks.build_failure("podman", ["STEP 5", "write /x: no space left on device", "Error: exit status 1"])
    assert str(full).startswith("No space left on device in the build: write /x")
    other = checks.build_failure("podman", ["STEP 5", "Error: exit status 1"])
    assert str(other) == "podman could not build the image; its last words: Error: exit status 1"


def test_the_tables_agree_with_the_guides_figures() -> None:
    image = Image(sum(GUIDE.values()), 5 * GIB)  # the guide's base
    assert image.models / GIB == 236.5
    assert image.size / GIB == pytest.approx(241, abs=0.6)
    assert image.push_hours(100) == pytest.approx(5.5, rel=0.05)
    assert image.push_hours(500) == pytest.approx(1.1, rel=0.05)
    assert image.push_hours(1000) * 60 == pytest.approx(35, rel=0.05)
    assert image.vm_dollars(250, 250) == pytest.approx(0.50, abs=0.05)  # 5 hours, at what a VM's network gives
    assert HUB_DOLLARS == 5


def test_building_md_has_the_tables_that_the_script_prints() -> None:
    printed = tables(GUIDE, code=9e9)
    assert printed in (REPOSITORY / "docs" / "BUILDING.md").read_text()
