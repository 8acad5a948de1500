"""Weights of one byte: made from wider ones as a model is loaded, and read from the published quantised files.

Only the linear layers inside the blocks are quantised. They hold 98 % of the transformer, and the rest (time,
modulation, norms, embedders, head) is what a small error does most harm to.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

from infinitetalk.errors import CheckpointError

Quantization = Literal["fp8", "int8"]
"""What the weights, and with them the activations, are rounded to: 8-bit floats (e4m3) or integers."""

FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability whose cards multiply in fp8: Ada (RTX 4090, L40S), then Hopper."""

QUANTO_TYPES = {"qfloat8": torch.float8_e4m3fn, "qfloat8_e4m3fn": torch.float8_e4m3fn, "qint8": torch.int8}
"""optimum-quanto's names for the types that we read; both of the first two are in use for the same."""

_SMALLEST = 1e-12
"""What the largest value of a row counts as at least: a row of zeros would get the scale 0, and become NaN."""


def quantized(weight: Tensor, kind: Quantization) -> Tensor:
    """float [outputs, inputs] → the same in one byte per element, with a float32 scale per output.

    A layer with such a weight rounds its input too, each row with a scale of its own, and multiplies in 8 bits. Cards
    before Ada cannot in fp8: where the machine's is such a card, an fp8 weight is widened again at each use, which
    saves memory and costs time; int8 does multiply in int8 there.
    """
    if kind == "int8":
        return Int8Tensor.from_hp(weight, PerRow(), act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerRow()))
    older = torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY
    return Float8Tensor.from_hp(
        weight,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        hp_value_lb=_SMALLEST,
        act_quant_kwargs=None if older else QuantizeTensorToFloat8Kwargs(hp_value_lb=_SMALLEST),
    )


def quantizer(model: nn.Module, kind: Quantization | None) -> Callable[[str, Tensor], Tensor]:
    """What a loader does to each tensor, by its name in the model, before it keeps it: one wide weight at a time."""
    chosen = linear_weights(model)

    @torch.no_grad()
    def finish(name: str, tensor: Tensor) -> Tensor:
        return tensor if kind is None or name not in chosen else quantized(tensor, kind)

    return finish


def quantize(model: nn.Module, kind: Quantization) -> None:
    """Quantise a loaded model in place, layer by layer."""
    finish = quantizer(model, kind)
    for name in linear_weights(model):
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.weight = nn.Parameter(finish(name, layer.get_parameter("weight")), requires_grad=False)


def linear_weights(model: nn.Module) -> list[str]:
    """The weights that are quantised: those of all linear layers inside the model's blocks (T5: `encoder.block`)."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not {"blocks", "block"}.isdisjoint(name.split("."))
    ]


class StoredTensors(Protocol):
    """The tensors of one or more files, by their published names: what a loader reads from."""

    files: list[Path]

    def names(self) -> dict[str, str]: ...
    def file_of(self, name: str) -> Path: ...
    def shape(self, name: str) -> list[int]: ...
    def read(self) -> Iterator[tuple[str, Tensor]]: ...


class DequantizedTensors:
    """A file of optimum-quanto's, read as if its weights had never been quantised.

    A quantised `<module>.weight` is there as `<module>.weight._data`, a byte per element, and `<module>.weight._scale`,
    [outputs, 1]; `input_scale` and `output_scale` belong to quantised activations, which the published files have not.
    A JSON file beside it maps each such module to its types: {"weights": "qfloat8", "activations": "none"}.
    """

    def __init__(self, stored: StoredTensors, modules: Mapping[str, Any]) -> None:
        """stored: one file; modules: the content of its map. Raises CheckpointError where they do not fit together."""
        self.files = stored.files
        self._stored = stored
        self._types = {f"{name}.weight": self._type(name, entry) for name, entry in modules.items()}
        names = stored.names().keys()
        if strange := {name.removesuffix("._data") for name in names if name.endswith("._data")} - self._types.keys():
            raise CheckpointError(f"{self.files[0]} has a quantised {min(strange)!r}, which is not in its map.")
        absorbed = {f"{name}.{scale}" for name in modules for scale in ("input_scale", "output_scale")}
        for name in self._types:
            expected, scale = [*stored.shape(f"{name}._data")[:1], 1], stored.shape(f"{name}._scale")
            if scale != expected:
                raise CheckpointError(f"{self.files[0]}: {name}._scale has shape {scale}, expected {expected}.")
            absorbed |= {f"{name}._data", f"{name}._scale"}
        self._names = {name: name for name in [*(names - absorbed), *self._types]}

    @staticmethod
    def quantized(stored: StoredTensors) -> bool:
        """Whether this is such a file, by its content."""
        return any(name.endswith(".weight._data") for name in stored.names())

    def names(self) -> dict[str, str]:
        return self._names

    def file_of(self, name: str) -> Path:
        return self.files[0]

    def shape(self, name: str) -> list[int]:
        return self._stored.shape(f"{name}._data" if name in self._types else name)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one at a time; what was quantised in float32."""
        scales = {name: tensor.clone() for name, tensor in self._stored.read() if name.endswith(".weight._scale")}
        for stored, tensor in self._stored.read():
            name = stored.removesuffix("._data")
            if name in self._types:
                if tensor.dtype != self._types[name]:
                    raise CheckpointError(f"{self.files[0]}: {stored} is {tensor.dtype}, its map: {self._types[name]}.")
                yield name, tensor.float().mul_(scales[f"{name}._scale"])
            elif stored in self._names:
                yield stored, tensor

    def _type(self, module: str, entry: Any) -> torch.dtype:
        types = entry if isinstance(entry, dict) else {}
        if types.get("weights") not in QUANTO_TYPES or types.get("activations") != "none":
            raise CheckpointError(
                f"{self.files[0]}: its map says {module!r} is {entry}; what can be read is weights as "
                f"{' or '.join(QUANTO_TYPES)} and activations as none."
            )
        return QUANTO_TYPES[types["weights"]]
