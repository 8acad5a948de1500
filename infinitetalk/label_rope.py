"""Which voice a token listens to: the label rotary position embedding (L-RoPE) of two speakers.

Each token of the video looks at the given first frame; in whose region there it looks most tells whom it shows. Its
query then turns to a position near that speaker's label, the speaker's audio tokens sit at that label, and so a voice
is heard mostly by the tokens that show its speaker (MultiTalk, arXiv:2505.22647).
"""

import torch
from torch import Tensor

LABELS = ((0.0, 4.0), (20.0, 24.0))
"""Positions that the tokens of speaker 1 and 2 spread over, by how surely they show that speaker."""
VOICES = (2.0, 22.0)
"""Positions of their audio tokens."""
BACKGROUND = 12.0
"""Position of a token that shows neither."""

_THETA = 10000.0


def attention_to_regions(query: Tensor, key: Tensor, regions: Tensor) -> Tensor:
    """How much each token looks at each region of the first latent frame.

    query, key: [1, S, heads, d] of a self-attention, after its rotary embedding; regions: bool [R, tokens of a frame]
    → float32 [R, S], the mean over heads and over a region's tokens; 0 for a region without tokens.
    """
    weights = regions.float() / regions.sum(dim=1, keepdim=True).clamp(min=1)
    key = key[:, : regions.shape[1]]
    total = torch.zeros(query.shape[1], len(regions), device=query.device)
    for head in range(query.shape[2]):  # one at a time: the map of all would take gigabytes
        logits = (query[0, :, head] * query.shape[-1] ** -0.5) @ key[0, :, head].T
        total += logits.softmax(dim=1, dtype=torch.float32) @ weights.T
    return (total / query.shape[2]).T


def token_positions(attention: Tensor) -> Tensor:
    """attention: float32 [3, S] to speaker 1, speaker 2 and the background → float32 [S], each token's position."""
    shows = attention.argmax(dim=0)
    position = torch.full_like(attention[0], BACKGROUND)
    for speaker, (low, high) in enumerate(LABELS):
        position = torch.where(shows == speaker, spread(attention[speaker], low, high), position)
    return position


def spread(values: Tensor, low: float, high: float) -> Tensor:
    """Scale values linearly so that the smallest becomes `low` and the largest `high`."""
    smallest, largest = values.min(), values.max()
    return (values - smallest) / (largest - smallest + 1e-8) * (high - low) + low


def voice_positions(tokens: int, device: torch.device) -> Tensor:
    """float32 [2 · tokens]: the positions of the audio tokens of speaker 1, then of speaker 2."""
    return torch.tensor(VOICES, device=device).repeat_interleave(tokens)


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """float32 [N] → cosines and sines of the angles that a head's N x d/2 pairs turn by, float32 [N, 1, d / 2]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, None] * _THETA**-exponents
    return angles.cos(), angles.sin()


def turn(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate neighbouring pairs of [..., N, heads, d] by the angles of `rotary`."""
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    return (
        torch.stack([first * cosines - second * sines, first * sines + second * cosines], -1)
        .flatten(-2)
        .type_as(states)
    )
