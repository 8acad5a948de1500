"""LoRAs: small files that change the transformer's base weights, such as those that make few steps enough.

A LoRA holds for some of the base parameters what is added to them at scale 1: the product `up @ down` of two thin
matrices, or the whole difference. It can be merged into the weights for good (`merge`, or `merger` as they are loaded)
or be there for a while (`applied`), several at a time. The audio branch is never touched.

What is read: `lora_down`/`lora_up` or `lora_A`/`lora_B`, with or without `alpha`, `diff` (of a weight), `diff_b` (of a
bias) and `diff_m` (of a modulation), under the module names of Wan2.1, of diffusers or of kohya's trainers
(`lora_unet_…`). Whatever else a file holds is refused by its name.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from infinitetalk.errors import CheckpointError, require


@dataclass(frozen=True)
class Delta:
    """What is added to one parameter at scale 1: `strength` times the product of the factors."""

    key: str
    """In the file."""
    parameter: str
    """In the transformer."""
    factors: tuple[Tensor, ...]
    """(difference,), or (up [out, rank], down [rank, in, …]); memory-mapped."""
    strength: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.factors[0].shape[:1], *self.factors[-1].shape[1:])

    def whole(self, device: torch.device) -> Tensor:
        """→ float32, shaped like the parameter."""
        first, *rest = (factor.to(device, torch.float32) for factor in self.factors)
        for factor in rest:
            first = first @ factor.flatten(1)
        return self.strength * first.view(self.shape)


@dataclass(frozen=True)
class Lora:
    path: Path
    deltas: tuple[Delta, ...]


_KEY = re.compile(
    r"(?:(?:base_model\.model|diffusion_model|transformer)\.)*(?P<module>.+?)\."
    r"(?:(?P<factor>lora_(?:down|up|A|B))(?:\.default)?\.weight|(?P<other>alpha|diff|diff_b|diff_m))"
)
_KOHYA = re.compile(r"lora_unet_blocks_(\d+)_(self_attn|cross_attn|ffn)_(\w+)")
_ROLES = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up", "diff_b": "diff", "diff_m": "diff"}

# Wan2.1's name of a module with parameters → diffusers' name. Written out, because the library's own converter replaces
# parts of a name wherever they are: it would make a norm3 of diffusers' own norm2, and something of any foreign name.
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_PICTURE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_MODULES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    **{f"blocks.{{}}.self_attn.{wan}": f"blocks.{{}}.attn1.{ours}" for wan, ours in _ATTENTION.items()},
    **{f"blocks.{{}}.cross_attn.{wan}": f"blocks.{{}}.attn2.{ours}" for wan, ours in (_ATTENTION | _PICTURE).items()},
    "blocks.{}.norm3": "blocks.{}.norm2",
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "head.head": "proj_out",
}
_MODULATIONS = {"blocks.{}": "blocks.{}.scale_shift_table", "head": "scale_shift_table"}


def read_lora(path: Path, reference_quirks: bool = False) -> Lora:
    """A LoRA from a .safetensors file, memory-mapped. Raises CheckpointError that names the file and the key.

    A product counts alpha / rank times where the file tells alpha, in a tensor or in diffusers' metadata: that is what
    trainers mean by it and what other programs do. The published code ignores alpha, which makes a file with alpha =
    rank / 2 twice as strong as it was trained; `reference_quirks` does the same.
    """
    tensors, metadata = _open(path)
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        kind = (match["factor"] or match["other"]) if match else ""
        parameter = _library_name(match["module"], kind) if match else None
        if parameter is None:
            raise CheckpointError(f"{path} has a tensor {key!r}, which is not of a LoRA for Wan2.1's transformer.")
        parts, role = found.setdefault(parameter, {}), _ROLES.get(kind, kind)
        if role in parts:
            raise CheckpointError(f"{path} has both {parts[role][0]!r} and {key!r}, which say the same.")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {key!r} is {tensor.dtype}; a LoRA's tensors are floating-point numbers.")
        parts[role] = (key, tensor)
    if not found:
        raise CheckpointError(f"{path} is empty: there is not one tensor in it.")
    declared = _declared_strength(path, metadata)
    deltas: list[Delta] = []
    for parameter, parts in found.items():
        if "diff" in parts:
            key, difference = parts["diff"]
            deltas.append(Delta(key, parameter, (difference,), 1.0))
        if "up" in parts or "down" in parts:
            product = _product(path, parameter, parts, declared)
            deltas.append(replace(product, strength=1.0) if reference_quirks else product)
        elif "diff" not in parts:
            raise CheckpointError(f"{path} has {parts['alpha'][0]!r}, but not what it is the alpha of.")
    return Lora(path, tuple(deltas))


def merge(model: nn.Module, lora: Lora, scale: float) -> None:
    """Add a LoRA to the weights, in place and for good: one parameter at a time, in float32, on its own device.

    Raises CheckpointError where it does not fit the model, and TypeError where the model is quantised already.
    """
    places = _places(model, lora)
    for module, leaf, delta in places:
        parameter = getattr(module, leaf)
        if type(parameter) is not nn.Parameter or parameter.dtype.itemsize < 2:
            raise TypeError(f"{delta.parameter} is quantised: merge LoRAs before quantising, or use `applied`.")
    for module, leaf, delta in places:
        _add(getattr(module, leaf), delta, scale)


def merger(model: nn.Module, loras: Sequence[tuple[Lora, float]]) -> Callable[[str, Tensor], Tensor]:
    """What a loader does to each tensor, by its name in the model, before it is quantised or kept: `merge`, on the way.

    Raises CheckpointError where a LoRA does not fit the model, which needs no storage yet.
    """
    changes: dict[str, list[tuple[Delta, float]]] = {}
    for lora, scale in loras:
        for _, _, delta in _places(model, lora):
            changes.setdefault(delta.parameter, []).append((delta, scale))

    @torch.no_grad()
    def finish(name: str, tensor: Tensor) -> Tensor:
        for delta, scale in changes.get(name, ()):
            tensor.copy_(tensor.add(delta.whole(tensor.device), alpha=scale))
        return tensor

    return finish


@contextmanager
def applied(model: nn.Module, loras: Sequence[tuple[Lora, float]]) -> Iterator[None]:
    """The model with these LoRAs, each at its scale, inside a `with` block; the very same as before after it.

    The weights of linear layers are left alone, so they may be quantised: what a LoRA adds is computed beside them,
    from tensors that move to the device of the computation at their first use and stay there until the block ends.
    Other parameters (norms, modulations, patch embedding: less than 0.1 % of all) are changed and put back. Enter it
    between two passes of the model, not within one; then the model may be offloaded to another device.
    """
    places = [(module, leaf, delta, scale) for lora, scale in loras for module, leaf, delta in _places(model, lora)]
    with ExitStack() as undo:
        for module, leaf, delta, scale in places:
            if isinstance(module, nn.Linear):
                undo.callback(module.register_forward_hook(_Branch(leaf, delta, scale)).remove)
            else:
                parameter = getattr(module, leaf)
                undo.callback(_put_back, parameter, parameter.detach().clone())
                _add(parameter, delta, scale)
        # Compiled code notices when a hook that it was made with is gone, but not that there is a new one.
        if any(module._compiled_call_impl is not None for module in model.modules()):
            torch.compiler.reset()
        yield


class _Branch:
    """A linear layer's forward hook: its output, and what a delta of its weight or bias adds to that."""

    def __init__(self, leaf: str, delta: Delta, scale: float) -> None:
        self.leaf, self.factors, self.scale = leaf, delta.factors, scale * delta.strength

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if (self.factors[0].device, self.factors[0].dtype) != (output.device, output.dtype):
            self.factors = tuple(factor.to(output.device, output.dtype) for factor in self.factors)
        if self.leaf == "bias":
            added = self.factors[0]
        else:
            added = inputs[0]
            for factor in reversed(self.factors):
                added = F.linear(added, factor)
        return torch.add(output, added, alpha=self.scale)


@torch.no_grad()
def _add(parameter: nn.Parameter, delta: Delta, scale: float) -> None:
    """In float32, then in place, in whatever storage the parameter has now: offloading keeps storages of its own."""
    parameter.copy_(parameter.add(delta.whole(parameter.device), alpha=scale))


@torch.no_grad()
def _put_back(parameter: nn.Parameter, original: Tensor) -> None:
    parameter.copy_(original)


# From names and shapes in the file to those in the model.


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and its metadata."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file, the only form of LoRA that is read.")
    require(path, "name the LoRA's file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is truncated or damaged: {error}.") from error


def _declared_strength(path: Path, metadata: dict[str, str]) -> float:
    """alpha / rank of products without an alpha of their own: 1, unless diffusers' metadata say otherwise."""
    try:
        declared = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {name.removeprefix("transformer."): value for name, value in declared.items()}
        strength = float(config.get("lora_alpha", 1) / config.get("r", 1))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its lora_adapter_metadata cannot be read: {error}.") from error
    for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
        if config.get(name):
            raise CheckpointError(f"{path}: its lora_adapter_metadata ask for {name}, which is not supported.")
    return strength


def _product(path: Path, parameter: str, parts: dict[str, tuple[str, Tensor]], declared: float) -> Delta:
    for half, other in (("up", "down"), ("down", "up")):
        if half not in parts:
            raise CheckpointError(f"{path} has {parts[other][0]!r} without its other half; is the file complete?")
    (key, up), (down_key, down) = parts["up"], parts["down"]
    if up.ndim < 2 or down.ndim < 2 or not up.flatten(1).shape[1] == len(down) > 0:
        raise CheckpointError(
            f"{path}: {key!r} has shape {list(up.shape)} and {down_key!r} {list(down.shape)}; "
            "expected [out, rank] and [rank, in]."
        )
    if "alpha" not in parts:
        return Delta(key, parameter, (up.flatten(1), down), declared)
    alpha_key, alpha = parts["alpha"]
    if alpha.numel() != 1:
        raise CheckpointError(f"{path}: {alpha_key!r} has shape {list(alpha.shape)}; an alpha is one number.")
    return Delta(key, parameter, (up.flatten(1), down), alpha.item() / len(down))


def _library_name(module: str, kind: str) -> str | None:
    """The transformer's name of the parameter that a key speaks of; None where there is none of that name."""
    module = _KOHYA.sub(r"blocks.\1.\2.\3", module)
    number = re.match(r"blocks\.(\d+)(?=\.|$)", module)
    if number:
        module = "blocks.{}" + module[number.end() :]
    if kind == "diff_m":
        name = _MODULATIONS.get(module)
    else:
        found = _MODULES.get(module, module if module in _MODULES.values() else None)
        name = found and f"{found}.{'bias' if kind == 'diff_b' else 'weight'}"
    return name and name.format(number and number[1])


def _places(model: nn.Module, lora: Lora) -> list[tuple[nn.Module, str, Delta]]:
    """For each delta the module and the name in it of the parameter, which is there and of the same shape."""
    places = []
    for delta in lora.deltas:
        owner, _, leaf = delta.parameter.rpartition(".")
        try:
            module = model.get_submodule(owner)
            parameter: Tensor = getattr(module, leaf)
        except AttributeError as error:
            raise CheckpointError(
                f"{lora.path}: {delta.key!r} is for {delta.parameter}, which this model lacks."
            ) from error
        if delta.shape != parameter.shape:
            raise CheckpointError(
                f"{lora.path}: {delta.key!r} is for a parameter of shape {list(delta.shape)}, but {delta.parameter} "
                f"has {list(parameter.shape)}; was the LoRA made for another model, such as one of another size?"
            )
        places.append((module, leaf, delta))
    return places
