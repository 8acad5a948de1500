"""What is promised everywhere, seen on a GPU: the published values, the same bytes again, memory that does not grow."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from infinitetalk.lora import read_lora
from infinitetalk.pipeline import Clip, InfiniteTalkPipeline, Speaker, Step
from infinitetalk.settings import Settings
from scripts import check_parity
from tests.conftest import GOLDENS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")
PICTURE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
SHORT = Settings(size="64x64", steps=2, frames_per_clip=17, motion_frames=5)
CASES = [case for case in check_parity.find_cases(GOLDENS, CUDA) if not case.name.startswith(("helpers", "frames"))]


def load(snapshots: Path, *options: str | None) -> InfiniteTalkPipeline:
    folders = (snapshots / name for name in ("Wan2.1-I2V-14B-480P", "InfiniteTalk", "chinese-wav2vec2-base"))
    return InfiniteTalkPipeline.from_snapshots(*folders, CUDA, *options)  # type: ignore[arg-type, call-arg]


@pytest.fixture(scope="module")
def resident(snapshots: Path) -> InfiniteTalkPipeline:
    return load(snapshots, "141gb")


def clips(pipeline: InfiniteTalkPipeline, speakers: int = 1, frames: int = 40, **options: object) -> Iterator[Clip]:
    voice = (0.1 * np.random.default_rng(1).standard_normal(frames * 640 + 32)).astype(np.float32)
    return pipeline.generate(PICTURE, [Speaker(voice)] * speakers, "Hi.", SHORT, **options)  # type: ignore[arg-type]


def video(pipeline: InfiniteTalkPipeline, speakers: int = 1) -> torch.Tensor:
    return torch.cat([clip.video for clip in clips(pipeline, speakers)], dim=1)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_float32_without_tf32_gives_the_published_values(
    case: check_parity.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    differences = check_parity.run_case(case)
    assert differences
    assert all(difference.within for difference in differences), differences


@pytest.mark.parametrize("speakers", [1, 2])
def test_the_same_seed_gives_the_same_bytes(resident: InfiniteTalkPipeline, speakers: int) -> None:
    assert torch.equal(video(resident, speakers), video(resident, speakers))


@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
@pytest.mark.parametrize("memory", ["80gb", "48gb", "24gb"])
def test_a_preset_changes_no_pixel(snapshots: Path, memory: str, quantization: str | None) -> None:
    whole, placed = load(snapshots, "141gb", quantization), load(snapshots, memory, quantization)
    for speakers in (1, 2):
        assert torch.equal(video(placed, speakers), video(whole, speakers))


@pytest.mark.parametrize("memory", ["141gb", "48gb"])
def test_a_lora_that_was_applied_leaves_no_trace(snapshots: Path, tiny_lora: Path, memory: str) -> None:
    pipeline = load(snapshots, memory)
    before = video(pipeline)
    with pipeline.with_loras([(read_lora(tiny_lora), 1.0)]):
        changed = video(pipeline)
    assert torch.equal(video(pipeline), before)
    assert not torch.equal(changed, before)


def test_a_run_goes_on_from_any_clip_as_if_it_had_not_stopped(resident: InfiniteTalkPipeline) -> None:
    whole = list(clips(resident))
    (last,) = clips(resident, resume_from=whole[-2].state)
    assert torch.equal(last.video, whole[-1].video)


def test_memory_does_not_grow_from_clip_to_clip(resident: InfiniteTalkPipeline) -> None:
    held = [(clip.index, torch.cuda.memory_allocated()) for clip in clips(resident, frames=80)]
    assert len(held) >= 6
    assert len({allocated for _, allocated in held[1:-1]}) == 1, held


def test_a_cancelled_run_leaves_nothing_on_the_gpu(resident: InfiniteTalkPipeline) -> None:
    video(resident)
    before = torch.cuda.memory_allocated()

    def cancel(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(clips(resident, on_step=cancel))
    assert torch.cuda.memory_allocated() == before


def test_a_full_gpu_raises_and_the_next_run_succeeds(resident: InfiniteTalkPipeline) -> None:
    expected = video(resident)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            video(resident)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(video(resident), expected)
