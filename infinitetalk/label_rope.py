"""Which voice a token listens to: the label rotary position embedding (L-RoPE) of two speakers.

Each token of the video looks at the given first frame; in whose region there it looks most tells whom it shows. Its
query then turns to a position near that speaker's label, the speaker's audio tokens sit at that label, and so a voice
is heard mostly by the tokens that show its speaker (MultiTalk, arXiv:2505.22647).
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
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

    query, key: [1, S, heads, d], turned already; regions: bool [R, tokens of a frame], R at most d
    → float32 [R, S], the mean over heads and over a region's tokens; 0 for a region without tokens.
    """
    heads, head_dim = query.shape[2:]
    # An attention whose values say which region a token is in adds up what is looked at in each; it is fused, and its
    # logits are float32, while the map of all heads written out would take gigabytes.
    inside = F.pad(regions.T.to(query.dtype), (0, head_dim - len(regions)))
    value = inside[None, :, None].repeat(1, 1, heads, 1)
    looks = dispatch_attention_fn(query, key[:, : regions.shape[1]], value)[0, :, :, : len(regions)]
    return looks.float().mean(dim=1).T / regions.sum(dim=1, keepdim=True).clamp(min=1)


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
    return torch.cat([torch.full((tokens,), position, device=device) for position in VOICES])


def rotary(positions: Tensor, head_dim: int) -> Tensor:
    """float32 [N] → the rotations of a head's N x d/2 pairs, complex64 [N, 1, d / 2]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, None] * _THETA**-exponents
    return torch.complex(angles.cos(), angles.sin())


def turn(states: Tensor, rotations: Tensor) -> Tensor:
    """Rotate neighbouring pairs of [..., N, heads, d] by rotations like those of `rotary`, in float32.

    As complex numbers: a GPU takes less than half the time that it takes with the two halves of the pairs apart.
    """
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).type_as(states)
