"""A model that followers load at once, and shares with which everything happens that can happen to a follower."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def load(broken: Path, device: str) -> SimpleNamespace:
    if broken.exists():
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return SimpleNamespace(transformer=10.0)


def load_forever(device: str) -> None:
    print("loading", flush=True)
    time.sleep(1000)


@dataclass
class Add:
    """Adds the model, and one more in each step."""

    more: float = 0.0

    def begin(self, model: float) -> None:
        self.more = 0.0

    def __call__(self, model: float, latents: Tensor, time: Tensor) -> list[Tensor]:
        self.more += 1
        return [latents + model + self.more]


@dataclass
class Trouble(Add):
    """The same, but that something happens in the second step."""

    happens: Callable[[], Any] = bool

    def __call__(self, model: float, latents: Tensor, time: Tensor) -> list[Tensor]:
        if self.more:
            self.happens()
        return super().__call__(model, latents, time)


def fail() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
