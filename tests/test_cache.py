"""Skipped forwards: whose memory is whose, when it is used, and that it ends with the clip."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import Tensor

from infinitetalk.cache import WARM_UP_STEPS, TeaCache, coefficients
from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker
from infinitetalk.settings import Settings
from tests.test_pipeline import PICTURE, generate, video, voice

STEPS = 8
SETTINGS = Settings(size="64x64", steps=STEPS, frames_per_clip=17, motion_frames=5, teacache=0.3)


class Blocks:
    """Stands for the transformer's blocks: adds 1, then 2, then 3, …, so that a reused outcome is recognised."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return tokens + self.runs


def embedding(value: float) -> Tensor:
    return torch.full((1, 6, 4), value)


def test_the_first_five_steps_are_computed_and_then_what_has_not_changed_is_not() -> None:
    cache, blocks, tokens = TeaCache(0.1, (1.0, 0.0), kinds=1, steps=20), Blocks(), torch.zeros(1)
    outcomes = [cache(embedding(1.0), tokens, blocks).item() for _ in range(WARM_UP_STEPS + 3)]
    assert outcomes == [1, 2, 3, 4, 5, 5, 5, 5]
    assert cache.computed == [True] * 5 + [False] * 3


def test_changes_add_up_until_the_threshold() -> None:
    cache, blocks = TeaCache(0.25, (1.0, 0.0), kinds=1, steps=100), Blocks()
    value, computed = 1.0, []
    for step in range(WARM_UP_STEPS + 9):
        if step >= WARM_UP_STEPS:
            value *= 1.1  # a relative change of 0.1 in every step
        cache(embedding(value), torch.zeros(1), blocks)
        computed.append(cache.computed[-1])
    assert computed[WARM_UP_STEPS:] == [False, False, True] * 3


def test_each_kind_of_forward_gets_its_own_outcome_back() -> None:
    cache, tokens = TeaCache(1.0, (1.0, 0.0), kinds=3, steps=20), torch.zeros(1)
    for _ in range(WARM_UP_STEPS):
        for kind in (1, 2, 3):
            cache(embedding(1.0), tokens, lambda tokens, kind=kind: tokens + 10 * kind)  # type: ignore[misc]
    reused = [cache(embedding(1.0), tokens + 1, Blocks()).item() for _ in range(3)]
    assert reused == [11, 21, 31]


def test_the_polynomial_is_that_of_the_size() -> None:
    assert coefficients(640, 640) != coefficients(960, 960)
    assert coefficients(320, 1216) == coefficients(640, 640)
    assert coefficients(704, 1280) == coefficients(960, 960)


@pytest.fixture
def slow_time(pipeline: InfiniteTalkPipeline) -> Iterator[None]:
    """The tiny model's time embedding changes too fast for any forward to be skipped: make it change slowly."""
    projection = pipeline.transformer.condition_embedder.time_proj
    kept = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    projection.weight.mul_(0.01)
    projection.bias.add_(0.5)
    yield
    projection.load_state_dict(kept)


class Counter:
    """How often the blocks' feed-forward layers run while it is open."""

    def __init__(self, pipeline: InfiniteTalkPipeline) -> None:
        self._blocks: list[Any] = list(pipeline.transformer.blocks)
        self.runs = 0

    def _count(self, *_: object) -> None:
        self.runs += 1

    def __enter__(self) -> "Counter":
        self._hooks = [block.ffn.register_forward_hook(self._count) for block in self._blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.runs //= len(self._blocks)


@pytest.mark.usefixtures("slow_time")
@pytest.mark.parametrize(("text_guidance", "kinds"), [(5.0, 3), (1.0, 2)])
def test_a_run_skips_forwards_and_consecutive_runs_are_equal(
    pipeline: InfiniteTalkPipeline, text_guidance: float, kinds: int
) -> None:
    settings = replace(SETTINGS, text_guidance=text_guidance)
    with Counter(pipeline) as counted:
        first = video(generate(pipeline, 18, settings))
    assert 2 * kinds * WARM_UP_STEPS <= counted.runs < 2 * kinds * STEPS
    list(generate(pipeline, 10, replace(settings, text_guidance=6 - text_guidance)))
    assert torch.equal(video(generate(pipeline, 18, settings)), first)


@pytest.mark.usefixtures("slow_time")
def test_a_resumed_run_skips_what_an_undisturbed_one_skips(pipeline: InfiniteTalkPipeline) -> None:
    settings = replace(SETTINGS, text_guidance=1.0)
    first, second = generate(pipeline, 18, settings)
    (resumed,) = generate(pipeline, 18, settings, resume_from=first.state)
    assert torch.equal(resumed.video, second.video)


@pytest.mark.usefixtures("slow_time")
def test_skipping_changes_the_video_a_little_and_a_threshold_of_nothing_not_at_all(
    pipeline: InfiniteTalkPipeline,
) -> None:
    exact = video(generate(pipeline, 10, replace(SETTINGS, teacache=0.0)))
    assert torch.equal(video(generate(pipeline, 10, replace(SETTINGS, teacache=1e-9))), exact)
    skipped = video(generate(pipeline, 10, SETTINGS))
    assert 0 < (skipped - exact).abs().mean() < 0.2


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=5.0),
        MagCacheConfig(threshold=0.1, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)),
        TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d+\.(attn[12]|ffn)"]
        ),
    ],
    ids=lambda config: type(config).__name__.removesuffix("Config"),
)
def test_the_librarys_own_caches_fit(pipeline: InfiniteTalkPipeline, config: Any) -> None:
    settings = replace(SETTINGS, teacache=0.0)
    exact = video(generate(pipeline, 5, settings))
    speakers = [Speaker(voice(5)), Speaker(voice(5)[::-1].copy())]
    pipeline.transformer.enable_cache(config)
    try:
        first = video(generate(pipeline, 5, settings))
        two = video(pipeline.generate(PICTURE, speakers, "", settings))
        assert not torch.equal(first, exact)
        assert torch.equal(video(generate(pipeline, 5, settings)), first), "the two runs before left nothing behind"
        assert two.isfinite().all()
    finally:
        pipeline.transformer.disable_cache()
    assert torch.equal(video(generate(pipeline, 5, settings)), exact)
