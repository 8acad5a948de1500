"""From a picture and a voice to clips: lengths, seeds, interruption, refusals."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from infinitetalk.errors import InputError
from infinitetalk.pipeline import Clip, ClipState, InfiniteTalkPipeline, Speaker, Step
from infinitetalk.settings import Settings

SHORT = Settings(size="64x64", steps=2, frames_per_clip=17, motion_frames=5)
PICTURE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def voice(frames: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(1).standard_normal(frames * 640 + 32)).astype(np.float32)


def generate(
    pipeline: InfiniteTalkPipeline, frames: int, settings: Settings = SHORT, **options: object
) -> Iterator[Clip]:
    return pipeline.generate(PICTURE, [Speaker(voice(frames))], "A person talks.", settings, **options)  # type: ignore[arg-type]


def video(clips: Iterator[Clip]) -> torch.Tensor:
    return torch.cat([clip.video for clip in clips], dim=1)


@pytest.mark.parametrize("frames", [1, 2, 9, 16, 17, 18, 29, 30])
def test_the_video_is_as_long_as_the_voice(pipeline: InfiniteTalkPipeline, frames: int) -> None:
    clips = list(generate(pipeline, frames, Settings(size="64x64", steps=1, frames_per_clip=17, motion_frames=5)))
    assert sum(len(clip.frames) for clip in clips) == frames
    assert [clip.index for clip in clips] == list(range(clips[0].clips))


def test_frames_are_rgb_bytes_of_the_size_asked_for(pipeline: InfiniteTalkPipeline) -> None:
    (clip,) = generate(pipeline, 5, Settings(size="96x64", steps=1, frames_per_clip=5, motion_frames=1))
    assert clip.frames.shape == (5, 64, 96, 3)
    assert clip.frames.dtype == np.uint8
    levels = (clip.video[:, 2, 10, 20] + 1) / 2 * 255
    assert clip.frames[2, 10, 20].tolist() == [int(level) for level in levels], "truncated, as published"


def test_the_same_seed_gives_the_same_video_and_another_seed_another(pipeline: InfiniteTalkPipeline) -> None:
    first, again, other = (
        video(generate(pipeline, 10, Settings(size="64x64", steps=2, frames_per_clip=17, motion_frames=5, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_run_interrupted_after_any_clip_goes_on_as_if_it_had_not_been(
    pipeline: InfiniteTalkPipeline, tmp_path: Path
) -> None:
    whole = list(generate(pipeline, 45))
    assert len(whole) == 4
    for stop in range(3):
        begun = generate(pipeline, 45)
        states = [next(begun).state for _ in range(stop + 1)]
        begun.close()  # type: ignore[attr-defined]
        state = states[-1]
        assert state is not None
        state.save(tmp_path / "state.safetensors")
        rest = list(generate(pipeline, 45, resume_from=ClipState.load(tmp_path / "state.safetensors")))
        assert [clip.index for clip in rest] == list(range(stop + 1, 4))
        for resumed, undisturbed in zip(rest, whole[stop + 1 :], strict=True):
            assert torch.equal(resumed.video, undisturbed.video)
    assert whole[-1].state is None


def test_each_clip_starts_from_the_end_of_the_one_before(pipeline: InfiniteTalkPipeline) -> None:
    first = next(generate(pipeline, 45))
    assert first.state is not None
    assert torch.equal(first.state.motion, first.video[:, -5:])


def test_every_step_is_reported_and_may_stop_the_run(pipeline: InfiniteTalkPipeline) -> None:
    steps: list[Step] = []
    list(generate(pipeline, 20, on_step=steps.append))
    assert [(step.clip, step.step) for step in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(step.clips, step.steps) for step in steps} == {(2, 2)}
    assert steps[0].latents.shape == (16, 5, 8, 8)

    class StopError(Exception):
        pass

    def stop(step: Step) -> None:
        raise StopError

    with pytest.raises(StopError):
        next(generate(pipeline, 20, on_step=stop))


def test_a_generator_overrides_the_seed(pipeline: InfiniteTalkPipeline) -> None:
    seeded = video(generate(pipeline, 10))
    given = video(generate(pipeline, 10, generator=torch.Generator().manual_seed(42)))
    other = video(generate(pipeline, 10, generator=torch.Generator().manual_seed(43)))
    assert torch.equal(seeded, given)
    assert not torch.equal(seeded, other)


def test_silence_is_a_valid_voice(pipeline: InfiniteTalkPipeline) -> None:
    silence = Speaker(np.zeros(6400, np.float32))
    assert video(pipeline.generate(PICTURE, [silence], "", SHORT)).isfinite().all()


def test_the_voice_and_the_prompt_matter(pipeline: InfiniteTalkPipeline) -> None:
    silence = [Speaker(np.zeros(10 * 640, np.float32))]
    speaking, prompted = generate(pipeline, 10), pipeline.generate(PICTURE, silence, "A dog barks.", SHORT)
    silent = video(pipeline.generate(PICTURE, silence, "A person talks.", SHORT))
    assert not torch.equal(video(speaking), silent)
    assert not torch.equal(video(prompted), silent)


def test_the_default_shift_is_that_of_the_size(pipeline: InfiniteTalkPipeline) -> None:
    shifts = {None: 7.0, 11.0: 11.0}
    videos = [
        video(generate(pipeline, 5, Settings(size="64x64", steps=2, frames_per_clip=5, motion_frames=1, shift=shift)))
        for shift in (*shifts, *shifts.values())
    ]
    assert torch.equal(videos[0], videos[2])
    assert torch.equal(videos[1], videos[3])
    assert not torch.equal(videos[0], videos[1])


def test_nothing_black_comes_out_of_a_broken_model(pipeline: InfiniteTalkPipeline) -> None:
    bias = pipeline.transformer.proj_out.bias
    kept = bias.clone()
    try:
        bias.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="clip 1 of 1"):
            list(generate(pipeline, 5))
    finally:
        bias.copy_(kept)


def test_what_cannot_be_generated_is_refused_by_name(pipeline: InfiniteTalkPipeline) -> None:
    for count in (0, 3):
        with pytest.raises(InputError, match=f"{count} speakers") as refusal:
            next(pipeline.generate(PICTURE, [Speaker(voice(5))] * count, "", SHORT))
        assert refusal.value.param == "speakers"
    with pytest.raises(InputError, match="shorter than one video frame"):
        next(pipeline.generate(PICTURE, [Speaker(voice(1)[:600])], "", SHORT))
    for wrong in ({"steps": 0}, {"shift": 0.0}, {"color_correction": 1.5}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Settings(**wrong)
