"""Several GPUs: the forwards of a denoising step, each on a rank of its own. Exact, and up to three times as fast.

Rank 0 runs the pipeline. Each further rank, a *follower*, holds a transformer and nothing else: it is told its share
of a clip (the conditions, and which forwards are its own), and answers the latents of each step with its predictions.
What a run carries from step to step and from clip to clip is rank 0's alone, so nothing can drift apart; and a run that
ends between two steps, for whatever reason, leaves followers that wait for the next.

The ranks talk over torch.distributed's gloo, on GPUs too. A step moves 8 MB each way at 480p, milliseconds among
seconds; and gloo notices at once that a process has died, where NCCL waits for a timeout and then ends the others.

    torchrun --nproc_per_node=3 scripts/generate.py …        # every process runs the script: `Leader` and `follow`
    pipeline.ranks = Followers(load, 3)                       # one process starts the others, and starts them again
"""

import io
import multiprocessing
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from infinitetalk.errors import InputError, RankError

LONGEST_STEP = timedelta(minutes=10)
"""What a follower that lives may take for a step, and all for finding each other."""
LONGEST_WAIT = timedelta(days=3650)
"""What a follower waits for work, and what it may take to load: it ends with rank 0."""

Load = Callable[[str], Any]
"""A device's name → a pipeline, of which a follower keeps the transformer. It travels to a process: a picklable one."""


class Share(Protocol):
    """The forwards of one rank in every step of a clip. It travels to its rank: a picklable one."""

    def begin(self, model: Any, /) -> None:
        """Called once, before the first step."""

    def __call__(self, model: Any, latents: Tensor, time: Tensor, /) -> list[Tensor]:
        """The predictions of one step."""


class Ranks:
    """Who computes the forwards of a step: here, this process alone."""

    size = 1

    def begin(self, model: Any, shares: Sequence[Share]) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """Begin a clip. shares: for as many ranks as have one, this rank's first → the function that makes a step's
        predictions, in the shares' order, from latents and time."""
        shares[0].begin(model)
        return partial(shares[0], model)

    def wait(self) -> None:
        """Until all have loaded their models. Raises RankError."""

    def close(self) -> None:
        """Let the others go."""


class Leader(Ranks):
    """Rank 0 of processes that somebody else started: torchrun, by default. A process can be in one group at a time."""

    def __init__(self, **rendezvous: Any) -> None:
        _join(**rendezvous)
        self.size = dist.get_world_size()

    def wait(self) -> None:
        for rank in range(1, self.size):
            self._receive(rank, torch.device("cpu"), LONGEST_WAIT)

    def begin(self, model: Any, shares: Sequence[Share]) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """Raises RankError, as the function that it returns does; and torch.OutOfMemoryError where a GPU is full."""
        others = range(1, len(shares))
        for rank in others:
            self._send(rank, shares[rank])
        own = super().begin(model, shares)

        def step(latents: Tensor, time: Tensor) -> list[Tensor]:
            for rank in others:
                self._send(rank, (latents, time))
            try:
                predictions = own(latents, time)
            finally:  # an answer left lying would be taken for the next step's
                answers = [self._receive(rank, latents.device, LONGEST_STEP) for rank in others]
            return [*predictions, *(prediction for answer in answers for prediction in answer)]

        return step

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _send(self, rank: int, message: Any) -> None:
        with self._talking_to(rank):
            _send(message, rank, LONGEST_STEP)

    def _receive(self, rank: int, device: torch.device, timeout: timedelta) -> Any:
        with self._talking_to(rank):
            packed = _receive(rank, timeout)
        message = _unpacked(packed, device)
        if isinstance(message, _Failure):
            self.close()
            kind = torch.OutOfMemoryError if message.out_of_memory else RankError
            raise kind(f"rank {rank} of {self.size} failed: {message.reason}")
        return message

    @contextmanager
    def _talking_to(self, rank: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise RankError(f"rank {rank} of {self.size} has died or hangs: {error}") from error


class Followers(Leader):
    """Rank 0 that starts the other ranks itself, on this machine.

    They end with this process, even if it is killed. If one of them ends first, all are started again when the next
    clip begins, which then waits for them.
    """

    def __init__(self, load: Load, size: int, device: str | None = None) -> None:
        """size: of all ranks; device: as for `device_of`. Returns at once: load a model here meanwhile, then `wait`."""
        self.size, self._load, self._device = size, load, device
        self._start()

    def wait(self) -> None:
        store = FileStore(self._meeting_point, self.size)
        for rank, process in enumerate(self._processes, 1):
            while not store.check([_greeting(rank)]):
                process.join(0.1)
                if process.exitcode is not None:
                    self.close()
                    raise RankError(f"rank {rank} of {self.size} ended as it began (exit code {process.exitcode}).")
        _join(store=store, rank=0, world_size=self.size)
        super().wait()

    def begin(self, model: Any, shares: Sequence[Share]) -> Callable[[Tensor, Tensor], list[Tensor]]:
        if any(process.exitcode is not None for process in self._processes):
            self.close()
            self._start()
            self.wait()
        return super().begin(model, shares)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        super().close()
        self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")  # a file, not a port: nobody else can come in
        self._meeting_point = str(Path(self._folder.name) / "store")
        spawn = multiprocessing.get_context("spawn")
        self._processes = [
            spawn.Process(
                target=_follow_parent,
                args=(self._load, device_of(rank, self._device), rank, self.size, self._meeting_point),
                name=f"rank {rank}",
                daemon=True,
            )
            for rank in range(1, self.size)
        ]
        for process in self._processes:
            process.start()


@torch.no_grad()
def follow(load: Load, device: str, **rendezvous: Any) -> None:
    """A follower's life: load, compute what rank 0 asks for, and end when rank 0 ends. Raises what goes wrong here."""
    _join(**rendezvous)
    with _last_words(device):
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        model = load(device).transformer
        _send("loaded", 0, LONGEST_WAIT)
    share: Share | None = None
    while True:
        try:
            packed = _receive(0, LONGEST_WAIT)
        except RuntimeError:
            return
        with _last_words(device):
            message = _unpacked(packed, torch.device(device))
            if share is not None and isinstance(message, tuple):
                _send(share(model, *message), 0, LONGEST_WAIT)
            else:
                share = message
                message.begin(model)


def torchrun_rank() -> int | None:
    """Which of torchrun's processes this one is; None if it is none of them."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else None


def device_of(rank: int, device: str | None = None) -> str:
    """A rank's device: of `cuda`, which is taken where there is one if nothing is given, the GPU of its number.

    Raises InputError where there is no such GPU.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cuda":
        return device
    if rank >= torch.cuda.device_count():
        raise InputError("device", f"GPU {rank + 1} was asked for, and this machine has {torch.cuda.device_count()}.")
    return f"cuda:{rank}"


@dataclass(frozen=True)
class _Failure:
    """A follower's last words."""

    reason: str
    out_of_memory: bool


@contextmanager
def _last_words(device: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failure = _Failure(f"{type(error).__name__} on {device}: {error}", isinstance(error, torch.OutOfMemoryError))
        _send(failure, 0, LONGEST_WAIT)
        with suppress(RuntimeError):  # rank 0 ends the group once it has read that; until then it may be sending
            while True:
                _receive(0, LONGEST_WAIT)
        raise


def _follow_parent(load: Load, device: str, rank: int, size: int, meeting_point: str) -> None:
    """The main function of a process that `Followers` started."""
    os.setsid()  # Ctrl-C is rank 0's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = FileStore(meeting_point, size)
    store.set(_greeting(rank), "here")
    follow(load, device, store=store, rank=rank, world_size=size)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)  # now: the GPU's memory is needed by the next runner


def _greeting(rank: int) -> str:
    return f"rank {rank}"


def _join(**rendezvous: Any) -> None:
    """Meet the other ranks."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # else it listens where the host's name points to
    dist.init_process_group("gloo", timeout=LONGEST_STEP, **rendezvous)


def _send(message: Any, rank: int, timeout: timedelta) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    packed = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    for tensor in (torch.tensor([len(packed)]), packed):
        dist.isend(tensor, rank).wait(timeout)  # type: ignore[union-attr]


def _receive(rank: int, timeout: timedelta) -> Tensor:
    length = torch.empty(1, dtype=torch.int64)
    dist.irecv(length, rank).wait(timeout)  # type: ignore[union-attr]
    packed = torch.empty(int(length), dtype=torch.uint8)
    dist.irecv(packed, rank).wait(timeout)  # type: ignore[union-attr]
    return packed


def _unpacked(packed: Tensor, device: torch.device) -> Any:
    """What was sent, its tensors on `device`, wherever they were."""
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location=device, weights_only=False)
