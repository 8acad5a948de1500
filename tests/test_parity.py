"""Every golden case of the published implementation comes out the same here."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts import check_parity
from tests.conftest import GOLDENS

CASES = list(check_parity.find_cases(GOLDENS))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_golden_case(case: check_parity.Case) -> None:
    differences = check_parity.run_case(case)
    assert differences
    assert all(difference.within for difference in differences), differences


def copy_group(folder: Path, group: str) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(GOLDENS / f"{group}{suffix}", folder / f"{group}{suffix}")
    return folder


def test_a_wrong_value_is_reported_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_group(tmp_path, "helpers")
    tensors = load_file(tmp_path / "helpers.safetensors")
    tensors["timesteps.shift7.steps8"][3] += 1e-3
    save_file(tensors, tmp_path / "helpers.safetensors")
    assert check_parity.main([str(tmp_path)]) == 1
    assert "out or unknown: helpers/timesteps.shift7.steps8" in capsys.readouterr().out


def test_a_case_of_unknown_form_is_reported_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mystery.json", "mystery.safetensors"):
        shutil.copyfile(GOLDENS / f"frames{Path(name).suffix}", tmp_path / name)
    assert check_parity.main([str(tmp_path)]) == 1
    assert "out or unknown: mystery" in capsys.readouterr().out


def test_only_selects_by_glob(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_parity.main([str(GOLDENS), "--only", "frames/1?"]) == 0
    assert "10 within tolerance" in capsys.readouterr().out


def test_a_glob_that_selects_nothing_is_an_error() -> None:
    with pytest.raises(SystemExit):
        check_parity.main([str(GOLDENS), "--only", "no-such-case"])
