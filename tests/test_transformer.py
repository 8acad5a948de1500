"""The audio branch and the precision of the transformer, beyond what the golden cases pin."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infinitetalk import checkpoints
from infinitetalk.pipeline import InfiniteTalkPipeline
from infinitetalk.transformer import AudioCrossAttention, AudioProjection, InfiniteTalkTransformer3DModel


@torch.no_grad()
def test_each_latent_frame_hears_its_own_four_video_frames() -> None:
    torch.manual_seed(0)
    projection = AudioProjection(window=5, features=12 * 4, hidden=16, tokens=3, width=8)
    audio = torch.randn(1, 13, 5, 12, 4)  # 4 latent frames
    tokens = projection(audio)
    assert tokens.shape == (1, 4, 3, 8)
    heard_by_first_and_last_of_group = {(5, 0), (5, 2), (8, 2), (8, 4)}
    unheard = {(5, 3), (6, 1), (7, 4), (8, 1)}
    for frame, slot in heard_by_first_and_last_of_group | unheard:
        changed = audio.clone()
        changed[:, frame, slot] += 1
        moved = (projection(changed) != tokens).any(dim=(0, 2, 3)).tolist()
        assert moved == [False, False, (frame, slot) not in unheard, False], (frame, slot)


@torch.no_grad()
def test_a_frames_tokens_attend_to_that_frames_audio_only() -> None:
    torch.manual_seed(0)
    attention = AudioCrossAttention(dim=16, heads=2, audio_width=8)
    hidden, audio = torch.randn(1, 3 * 6, 16), torch.randn(1, 3, 5, 8)
    before = attention(hidden, audio)
    audio[:, 1] += 1
    moved = (attention(hidden, audio) != before).any(dim=2)[0]
    assert moved.tolist() == [False] * 6 + [True] * 6 + [False] * 6


@torch.no_grad()
def test_small_audio_features_are_normalised_with_the_published_epsilon() -> None:
    projection = AudioProjection(window=5, features=4, hidden=4, tokens=1, width=2)
    for parameter in projection.parameters():
        parameter.zero_()
    projection.norm.weight.fill_(1)
    projection.proj3.bias.copy_(torch.tensor([0.001, -0.001]))
    normed = projection(torch.zeros(1, 1, 5, 1, 4))[0, 0, 0, 0].item()
    assert normed == pytest.approx(0.001 / (1e-6 + 1e-5) ** 0.5, rel=1e-4)


@torch.no_grad()
def test_every_norm_of_a_block_has_the_published_epsilon(pipeline: InfiniteTalkPipeline) -> None:
    block: Any = pipeline.transformer.blocks[0]
    faint = torch.tensor([0.001, -0.001]).repeat(32)
    expected = (1e-6 / (1e-6 + 1e-6)) ** 0.5
    for norm in (block.norm1, block.norm3):
        assert norm(faint)[0].item() == pytest.approx(expected, rel=1e-4)
    for norm in (block.norm2, *block.norm_x.values()):
        assert ((norm(faint)[0] - norm.bias[0]) / norm.weight[0]).item() == pytest.approx(expected, rel=1e-4)
    for norm in (
        block.attn1.norm_q,
        block.attn1.norm_k,
        block.attn2.norm_q,
        block.attn2.norm_k,
        block.attn2.norm_added_k,
    ):
        assert (norm(faint)[0] / norm.weight[0]).item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_bfloat16_stays_close_to_float32_and_keeps_time_and_head_in_float32(
    pipeline: InfiniteTalkPipeline, snapshots: Path
) -> None:
    folders = snapshots / "Wan2.1-I2V-14B-480P", snapshots / "InfiniteTalk"
    half = checkpoints.load_transformer(*folders, torch.device("cpu"), torch.bfloat16)
    kept = {name for name, weight in half.named_parameters() if weight.dtype == torch.float32}
    assert "proj_out.weight" in kept
    assert "condition_embedder.time_proj.weight" in kept
    assert "blocks.0.attn1.to_q.weight" not in kept
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def predict(model: InfiniteTalkTransformer3DModel) -> torch.Tensor:
        dtype = model.patch_embedding.weight.dtype
        inputs = random(1, 36, 3, 8, 8), random(1, 512, 64), random(1, 257, 64), random(1, 1, 9, 5, 12, 32)
        latents, text, image, audio = (tensor.to(dtype) for tensor in inputs)
        return model(latents, torch.tensor([700.0]), text, image, audio)

    exact = predict(pipeline.transformer)
    generator.manual_seed(0)
    rounded = predict(half)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.02
