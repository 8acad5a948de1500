"""How far are narrower weights off? Each kind of module, and the whole transformer, against float32. Markdown.

    python -m benchmarks.quantization_error

On the CPU, on the tiny snapshot and on a wider random one. A module is given the very input that it has in float32, so
its figures are its own error; the whole forward gathers all of them. In percent: the Euclidean norm of the difference
over that of the float32 output, and the greatest difference over the greatest output, each the worst over blocks and
timesteps. Random weights have none of a trained model's outliers.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import Float8Tensor

from infinitetalk import checkpoints
from infinitetalk.quantization import quantize
from infinitetalk.transformer import InfiniteTalkTransformer3DModel
from scripts import make_tiny_snapshots as snapshots

IN_BLOCKS = {
    "self-attention": "attn1",
    "cross-attention": "attn2",
    "audio attention": "audio_cross_attn.single",
    "feed-forward": "ffn",
}
ALWAYS_FLOAT32 = {"time": "condition_embedder.time_embedder", "head": "proj_out"}
"""Their input is float32 too."""
WHOLE = "whole forward"
TIMESTEPS = (950.0, 500.0, 50.0)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        for name, latent_side in (("tiny", 16), ("wider", 32)):
            if name == "wider":
                snapshots.DIM, snapshots.HEADS, snapshots.FFN_DIM, snapshots.LAYERS = 1024, 8, 2816, 4
                snapshots.AUDIO_HIDDEN, snapshots.AUDIO_DIM = 512, 768
                snapshots.TEXT_DIM, snapshots.IMAGE_DIM = 512, 512
            snapshot = Path(folder) / name
            snapshot.mkdir()
            snapshots.write_wan(snapshot, seed=0)
            audio = snapshot / "infinitetalk.safetensors"
            save_file(snapshots.audio_branch(0, "single"), audio)
            print(f"\n{name}: width {snapshots.DIM}, {snapshots.LAYERS} blocks\n")
            compare(lambda dtype: load(snapshot, dtype), inputs(latent_side))  # noqa: B023  (called at once)
    return 0


def load(snapshot: Path, dtype: torch.dtype) -> InfiniteTalkTransformer3DModel:
    return checkpoints.load_transformer(snapshot, snapshot / "infinitetalk.safetensors", torch.device("cpu"), dtype)


def inputs(side: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (1, 2 * snapshots.LATENTS + 4, 3, side, side),
        "encoder_hidden_states": (1, 512, snapshots.TEXT_DIM),
        "encoder_hidden_states_image": (1, 257, snapshots.IMAGE_DIM),
        "audio": (1, 1, 9, snapshots.AUDIO_WINDOW, snapshots.SPEECH_LAYERS, snapshots.SPEECH_DIM),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compare(load: Callable[[torch.dtype], InfiniteTalkTransformer3DModel], conditions: dict[str, Tensor]) -> None:
    """Print the table of one model."""
    exact = load(torch.float32)
    columns = [*IN_BLOCKS, *ALWAYS_FLOAT32, WHOLE]
    print("| weights | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, narrow in NARROWER.items():
        model = load(torch.bfloat16)
        narrow(model)
        worst = dict.fromkeys(columns, (0.0, 0.0))
        for part, relative, largest in errors(exact, model, conditions):
            worst[part] = max(worst[part][0], relative), max(worst[part][1], largest)
        cells = (f"{100 * relative:.2f}, {100 * largest:.2f}" for relative, largest in worst.values())
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


@torch.no_grad()
def errors(
    exact: InfiniteTalkTransformer3DModel, model: InfiniteTalkTransformer3DModel, conditions: dict[str, Tensor]
) -> Iterator[tuple[str, float, float]]:
    """For each module and timestep: its kind, the relative and the largest error."""
    kinds = {name: kind for kind, name in ALWAYS_FLOAT32.items()}
    kinds |= {f"blocks.{i}.{name}": kind for i in range(len(exact.blocks)) for kind, name in IN_BLOCKS.items()}
    calls: list[tuple[str, tuple[Any, ...], Tensor]] = []
    hooks = [
        exact.get_submodule(name).register_forward_hook(
            lambda _, given, output, name=name: calls.append((name, given, output))
        )
        for name in kinds
    ]
    for timestep in map(torch.tensor, ([time] for time in TIMESTEPS)):
        calls.clear()
        expected = exact(timestep=timestep, **conditions)
        for name, given, output in calls:
            given = given if kinds[name] in ALWAYS_FLOAT32 else narrowed(given)
            yield kinds[name], *difference(model.get_submodule(name)(*given), output)
        predicted = model(timestep=timestep, **dict(zip(conditions, narrowed(conditions.values()), strict=True)))
        yield WHOLE, *difference(predicted, expected)
    for hook in hooks:
        hook.remove()


def narrowed(given: Any) -> tuple[Any, ...]:
    """As bfloat16; the rotary embedding, which is complex, stays as it is."""
    return tuple(
        value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value for value in given
    )


def difference(output: Tensor, expected: Tensor) -> tuple[float, float]:
    gap = output.float() - expected
    return (gap.norm() / expected.norm()).item(), (gap.abs().max() / expected.abs().max()).item()


def all_bfloat16(model: InfiniteTalkTransformer3DModel) -> None:
    """Time path, modulation, norms and head too; the float32 that reaches their layers is rounded on the way in."""
    nn.Module.to(model, torch.bfloat16)
    for layer in (*linear_layers(model.condition_embedder), model.proj_out):
        layer.register_forward_pre_hook(lambda _, given: narrowed(given))


def linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear))


def widened_fp8(model: InfiniteTalkTransformer3DModel) -> None:
    """As on cards that do not multiply in fp8: the weights alone are rounded to it."""
    quantize(model, "fp8")
    for parameter in model.parameters():
        if isinstance(parameter, Float8Tensor):
            parameter.act_quant_kwargs = None


NARROWER: dict[str, Callable[[InfiniteTalkTransformer3DModel], None]] = {
    "bf16; time, modulation, norms and head float32": lambda model: None,
    "bf16 throughout": all_bfloat16,
    "fp8, multiplied in fp8": lambda model: quantize(model, "fp8"),
    "fp8, widened at each use": widened_fp8,
    "int8, multiplied in int8": lambda model: quantize(model, "int8"),
}


if __name__ == "__main__":
    sys.exit(main())
