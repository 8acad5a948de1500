"""TeaCache: skips forwards whose outcome the time embedding says has barely changed (arXiv:2411.19108).

How far the embedding moved from one step to the next, through a polynomial fitted to the model, estimates how far the
blocks' outcome moves. While the sum of these estimates stays below a threshold, the blocks are not run: what they added
the last time is added again. Lossy, and about twice as fast at a threshold of 0.2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from infinitetalk.guidance import LARGE_AREA

WARM_UP_STEPS = 5
"""The first steps shape the video and are always computed."""

_COEFFICIENTS_480P = (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01)
_COEFFICIENTS_720P = (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02)


def coefficients(height: int, width: int) -> tuple[float, ...]:
    """The polynomial published for a video of that size in pixels, highest power first."""
    return _COEFFICIENTS_480P if height * width <= LARGE_AREA else _COEFFICIENTS_720P


@dataclass
class _Memory:
    """What one kind of forward remembers."""

    embedding: Tensor | None = None
    residual: Tensor | None = None
    estimate: float = 0.0


@dataclass
class TeaCache:
    """The memory of the forwards of a clip: `kinds` in each step, always in the same order.

    After `steps` steps it begins anew, but keeps what it remembers.
    """

    threshold: float
    polynomial: tuple[float, ...]
    kinds: int
    steps: int
    computed: list[bool] = field(default_factory=list)
    """For each forward so far, whether the blocks ran."""

    def __post_init__(self) -> None:
        self._memories = [_Memory() for _ in range(self.kinds)]

    def __call__(self, embedding: Tensor, tokens: Tensor, blocks: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens [B, S, D] after the blocks, or nearly; embedding: that of the time, modulated, [B, 6, D]."""
        forward = len(self.computed) % (self.kinds * self.steps)
        memory = self._memories[forward % self.kinds]
        if memory.embedding is None or memory.residual is None or forward < WARM_UP_STEPS * self.kinds:
            compute = True
        else:
            change = (embedding - memory.embedding).abs().mean() / memory.embedding.abs().mean()
            memory.estimate += float(np.polyval(self.polynomial, change.item()))
            compute = memory.estimate >= self.threshold
        memory.embedding = embedding
        self.computed.append(compute)
        if not compute and memory.residual is not None:
            return tokens + memory.residual
        memory.estimate = 0.0
        finished = blocks(tokens)
        memory.residual = finished - tokens
        return finished
