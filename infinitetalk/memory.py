"""What lies on the GPU, and when: presets by the GPU's memory.

What does not fit waits in the machine's own memory and comes when it is its turn: T5 and CLIP while they encode, and
the transformer block by block, each copied while the one before it computes (diffusers' group offloading). None of that
changes a pixel, and a preset never makes weights of one byte. One thing is not exact: on the smallest GPUs large videos
are decoded in tiles. `scripts/memory_presets.py` prints what each preset takes, part by part; docs/PERFORMANCE.md holds
its table.
"""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from infinitetalk.errors import InputError
from infinitetalk.geometry import BUCKETS

if TYPE_CHECKING:
    from infinitetalk.transformer import InfiniteTalkTransformer3DModel

GB = 10**9

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Preset:
    """Where the parts lie. VAE and speech encoder, 1 GB together, are always on the GPU."""

    name: str
    needs: int
    """Bytes of GPU memory for its `largest` video, reckoned from the published model's sizes."""
    largest: str
    """"480p", "720p" or "WIDTHxHEIGHT"; larger ones may fit."""
    offload_blocks: bool = False
    """The transformer waits in pinned memory; two of its blocks, with their audio branches, are on the GPU at once."""
    offload_encoders: bool = False
    """T5 and CLIP are on the GPU only while they encode."""
    whole_up_to: str | None = None
    """Videos larger than "480p" or "720p" are decoded in tiles; None: none are. Not exact: tiles do not see each other,
    and are blended where they overlap. Encoding is always whole."""

    def tiles(self, height: int, width: int) -> bool:
        """Is a video of that size, in pixels, decoded in tiles?"""
        return self.whole_up_to is not None and height * width > largest_area(self.whole_up_to)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("141gb", 105 * GB, "1280x1280"),
        Preset("80gb", 74 * GB, "720p", offload_encoders=True, whole_up_to="720p"),
        Preset("48gb", 31 * GB, "720p", offload_blocks=True, offload_encoders=True, whole_up_to="720p"),
        Preset("24gb", 47 * GB // 2, "720p", offload_blocks=True, offload_encoders=True, whole_up_to="480p"),
    )
}
"""By name, the largest first."""

IN_PLACE = Preset("cpu", 0, "1280x1280")
"""Without a GPU there is one memory, and everything in it."""


def largest_area(size: str) -> int:
    """Pixels of a frame in the largest bucket of "480p" or "720p"."""
    return max(height * width for height, width in BUCKETS[size].values())


def select(name: str | None, device: torch.device) -> Preset:
    """The preset of that name; without one, that for the GPU. Raises InputError("memory")."""
    if name is None:
        return choose(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else IN_PLACE
    if name not in PRESETS:
        raise InputError("memory", f"memory is {name!r}; use {', '.join(PRESETS)}, or nothing to go by the GPU.")
    return PRESETS[name]


def choose(total: int) -> Preset:
    """The largest preset for a GPU of `total` bytes, or the smallest of all.

    By all of its memory, not by what is free at the moment: presets differ in which videos they decode in tiles, and a
    run must go on in another process as it began.
    """
    return next((preset for preset in PRESETS.values() if preset.needs <= total), PRESETS["24gb"])


def smaller(preset: Preset) -> Preset | None:
    """The preset that takes the next less memory; None if none does."""
    return next((other for other in PRESETS.values() if other.needs < preset.needs), None)


def describe(preset: Preset, device: torch.device) -> str:
    """One line for the log: the preset, what it means, and the bytes."""
    if preset is IN_PLACE:
        return "memory preset cpu: everything stays in the machine's memory"
    places = ["transformer on the GPU, with both audio branches"]
    if preset.offload_blocks:
        places = ["transformer and both audio branches in the machine's memory, two blocks at a time on the GPU"]
    places.append(f"T5 and CLIP {'there only while they encode' if preset.offload_encoders else 'too'}")
    if preset.whole_up_to is not None:
        places.append(f"videos above {preset.whole_up_to} decoded in tiles, which is not exact")
    needs = f"needs {preset.needs / GB:.0f} GB for {preset.largest}"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        needs += f", of {total / GB:.1f} GB" + ("; TOO LITTLE, small videos may fit" if total < preset.needs else "")
    return f"memory preset {preset.name} ({needs}): {'; '.join(places)}"


def call_on(device: torch.device, module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Call a module on a device that it need not be on: with copies of its tensors, which go when it is done."""
    copies = {name: tensor.to(device) for name, tensor in chain(module.named_parameters(), module.named_buffers())}
    # T5's embedding is one module under two names: to swap it under both would leave a copy in its place afterwards.
    return functional_call(module, copies, arguments, options, tie_weights=False)


def offload_blocks(transformer: "InfiniteTalkTransformer3DModel", device: torch.device) -> None:
    """Let a transformer that lies in the machine's memory compute on `device`, one block after another.

    On a GPU it is pinned, so that the next block is copied while one computes. It is pinned here, one tensor at a
    time: the library would first make pinned copies of them all, and need the memory twice. Quantised weights are left
    to it: of those that are pinned already it would keep no copy, and lose them with the first block that it moves.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        for module in transformer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if type(parameter) is nn.Parameter:
                    setattr(module, name, nn.Parameter(parameter.detach().pin_memory(), requires_grad=False))
    transformer.enable_group_offload(device, CPU, num_blocks_per_group=1, use_stream=on_gpu)
    if on_gpu:
        # What is in no block the library copies to the GPU and back at every forward, through memory that is not
        # pinned. With a stream it keeps the pinned tensors, as it does for the blocks, and nothing is copied back.
        rest = transformer._diffusers_hook.get_hook("group_offloading").group
        rest.stream = torch.cuda.Stream(device)
        rest.cpu_param_dict = rest._init_cpu_param_dict()
