"""Print how much GPU memory the model takes, part by part, and what each preset of `infinitetalk.memory` needs.

    python scripts/memory_presets.py                   the published model, from its configuration
    python scripts/memory_presets.py --models DIR      the snapshots in DIR, from the shapes in their files

Weights are counted. What a computation takes beside them is counted too: the model's own code runs on torch's meta
device, which knows shapes and has no memory, and every tensor it makes is added up while it lives. Attention is taken
to be fused, as it is on a GPU. What cuDNN and CUDA take on top is as measured on an H200 (`benchmarks/gpu.py`); what
the allocator loses is an assumption: a tenth of the tensors.
"""

import argparse
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infinitetalk.errors import CheckpointError  # first: our package silences what diffusers imports

# isort: split
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel, Wav2Vec2Config, Wav2Vec2Model

from infinitetalk import checkpoints
from infinitetalk.checkpoints import FLOAT32_PARTS
from infinitetalk.geometry import BUCKETS
from infinitetalk.memory import GB, PRESETS, Preset
from infinitetalk.quantization import linear_weights
from infinitetalk.transformer import InfiniteTalkTransformer3DModel

META = torch.device("meta")
FRAMES, LATENT_FRAMES = 81, 21
SIZES = ("480p", "720p", "1280x1280")
BRANCHES = ("single", "multi")
KINDS = 3
"""Forwards of a step that TeaCache keeps an outcome of."""
ALLOCATOR = 0.1
"""What the allocator's rounding and fragmentation add to the tensors that come and go."""
CONVOLUTIONS = 0.15
"""What cuDNN takes beside the tensors while the VAE computes: 14 to 15 % of them, measured at 480p and 720p."""
FIXED = GB
"""CUDA's context and kernels; 0.93 GB measured."""
COPIED_BLOCKS = 2
"""Blocks on the GPU when they are offloaded: the one that computes, and the next."""


class Models(NamedTuple):
    """On the meta device, in the precisions of a GPU."""

    transformer: InfiniteTalkTransformer3DModel
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    image_encoder: CLIPVisionModel
    speech_encoder: Wav2Vec2Model


def stored(folder: Path) -> Models:
    """As the files in the three snapshots' folders say; only their headers are read."""
    wan, half = folder / "Wan2.1-I2V-14B-480P", torch.bfloat16
    return Models(
        checkpoints.load_transformer(wan, folder / "InfiniteTalk", META, half),
        checkpoints.load_vae(wan, META),
        checkpoints.load_text_encoder(wan, META, half),
        checkpoints.load_image_encoder(wan, META, torch.float16),
        checkpoints.load_speech_encoder(folder / "chinese-wav2vec2-base", META),
    )


def published() -> Models:
    """As Wan2.1-I2V-14B, InfiniteTalk and chinese-wav2vec2-base are."""
    return Models(*(model.to(META) for model in published_shapes()))


def published_shapes() -> Models:
    """The same, with parameters on the meta device and buffers that have their values."""
    with init_empty_weights(include_buffers=False):
        transformer = InfiniteTalkTransformer3DModel(
            num_attention_heads=40,
            attention_head_dim=128,
            in_channels=36,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=13824,
            num_layers=40,
            image_dim=1280,
            audio_features=12 * 768,
            audio_hidden=512,
            audio_tokens=32,
            audio_width=768,
            audio_window=5,
            audio_branches=BRANCHES,
            eps=1e-6,
        )
        t5 = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        text_encoder = UMT5EncoderModel(t5)
        text_encoder.encoder.embed_tokens = text_encoder.shared
        clip = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
        )
        models = Models(
            transformer,
            AutoencoderKLWan(base_dim=96),
            text_encoder.bfloat16(),
            CLIPVisionModel(clip).half(),
            Wav2Vec2Model(Wav2Vec2Config()),
        )
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in FLOAT32_PARTS):
            parameter.data = parameter.data.bfloat16()
    return Models(*(model.eval() for model in models))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside a `with` block for as long as they live; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((arguments, options))}
        made = function(*arguments, **(options or {}))
        for storage in _storages(made):
            if storage._cdata not in given and storage._cdata not in self._live:  # neither a view nor in place
                self._live.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return made

    def _freed(self, storage: int, nbytes: int) -> None:
        self._live.remove(storage)
        self._now -= nbytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Views have that of what they view; torch keeps one object for it as long as any of them lives."""
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


class FusedAttention(TorchFunctionMode):
    """Attention without its matrix of weights, as GPUs compute it; elsewhere torch writes it out."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(arguments[0] if arguments else options["query"])
        return function(*arguments, **(options or {}))


@torch.no_grad()
def peak_bytes(call: Callable[[], object]) -> int:
    """What a call takes beside its weights and arguments, its result included."""
    with FusedAttention(), LiveBytes() as live:
        call()
    return live.peak


def two_speakers(transformer: InfiniteTalkTransformer3DModel, height: int, width: int) -> tuple[Any, ...]:
    """What a forward over a clip is given, two people talking: they take more than one."""
    config, device = transformer.config, transformer.device
    dtype = transformer.patch_embedding.weight.dtype

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    regions = torch.zeros(2, height // 16, width // 16, dtype=torch.bool, device=device)
    regions[0, :, : width // 32], regions[1, :, width // 32 :] = True, True
    return (
        zeros(1, config.in_channels, LATENT_FRAMES, height // 8, width // 8),
        torch.zeros(1, device=device),
        zeros(1, 512, config.text_dim),
        zeros(1, 257, config.image_dim),
        zeros(1, 2, FRAMES, config.audio_window, 1, config.audio_features),
        "multi",
        regions,
    )


@dataclass(frozen=True)
class Activations:
    """What the computations of one size of video take beside the weights, in bytes."""

    forward: int
    forward_8_bit: int
    encoding: int
    decoding: int
    in_tiles: int
    kept: int
    """From clip to clip: TeaCache's outcomes."""


class Model:
    """What its parts and its computations take, in bytes. `weights` is "bfloat16" or "8-bit"."""

    def __init__(self, models: Models) -> None:
        self.vae, self.text, self.image, self.speech = (size(module) for module in models[1:])
        transformer, eight_bit = models.transformer, set(linear_weights(models.transformer))
        self.parameters: dict[str, dict[str, int]] = {"bfloat16": {}, "8-bit": {}}
        for name, parameter in transformer.named_parameters():
            self.parameters["bfloat16"][name] = parameter.nbytes
            # One byte per element, and a float32 scale per output.
            less = parameter.numel() + 4 * len(parameter) if name in eight_bit else parameter.nbytes
            self.parameters["8-bit"][name] = less
        transformer.blocks = transformer.blocks[:2]  # whose inputs are both alive in the second; no block needs more
        per_pixel = vae_per_pixel(models.vae)
        self.activations = {name: activations(transformer, models.vae, per_pixel, *largest(name)) for name in SIZES}

    def transformer(self, weights: str, part: str = "") -> int:
        """All of it, or the parameters with that in their names."""
        return sum(nbytes for name, nbytes in self.parameters[weights].items() if part in name)

    def on_gpu(self, preset: Preset, weights: str) -> int:
        """What is always there."""
        held = self.vae + self.speech
        held += 0 if preset.offload_encoders else self.text + self.image
        return held + (0 if preset.offload_blocks else self.transformer(weights))

    def in_machine(self, preset: Preset, weights: str) -> int:
        """What waits in the machine's memory."""
        waiting = self.text + self.image if preset.offload_encoders else 0
        return waiting + (self.transformer(weights) if preset.offload_blocks else 0)

    def needs(self, preset: Preset, name: str, weights: str = "bfloat16") -> int:
        """The most at any moment of a video of that size: with "720p" of the largest bucket."""
        took = self.activations[name]
        copied = 0
        if preset.offload_blocks:
            copied = self.transformer(weights) - self.transformer(weights, "blocks.")
            copied += COPIED_BLOCKS * self.transformer(weights, "blocks.0.")
        moments = {
            "a prompt": (self.text if preset.offload_encoders else 0, 0),
            "encoding": (0, took.encoding),
            "denoising": (copied, took.forward if weights == "bfloat16" else took.forward_8_bit),
            "decoding": (0, took.in_tiles if preset.tiles(*largest(name)) else took.decoding),
        }
        most = max(weight + round((1 + ALLOCATOR) * (passing + took.kept)) for weight, passing in moments.values())
        return self.on_gpu(preset, weights) + most + FIXED


def vae_per_pixel(vae: AutoencoderKLWan) -> tuple[float, float]:
    """What encoding and decoding a clip take per pixel of a frame; all of it grows with the frame."""
    side = 256
    video = torch.empty(1, 3, FRAMES, side, side, device=META)
    latents = torch.empty(1, vae.config.z_dim, LATENT_FRAMES, side // 8, side // 8, device=META)
    encoding = video.nbytes + peak_bytes(lambda: vae.encode(video))
    return encoding / side**2, peak_bytes(lambda: vae.decode(latents)) / side**2


def activations(
    transformer: InfiniteTalkTransformer3DModel,
    vae: AutoencoderKLWan,
    per_pixel: tuple[float, float],
    height: int,
    width: int,
) -> Activations:
    area, config = height * width, transformer.config
    tokens, video = LATENT_FRAMES * area // 256, 3 * FRAMES * area * 4
    given = two_speakers(transformer, height, width)
    forward = peak_bytes(lambda: transformer(*given))
    encoding, decoding = (round((1 + CONVOLUTIONS) * of * area) for of in per_pixel)
    tile, stride = vae.tile_sample_min_height, vae.tile_sample_stride_height
    return Activations(
        forward=forward,
        forward_8_bit=forward + tokens * config.ffn_dim,  # the widest input of a linear layer, rounded
        encoding=encoding,
        decoding=decoding,
        # One tile; and all of them, which overlap, their rows, the whole, and that clamped.
        in_tiles=round((1 + CONVOLUTIONS) * per_pixel[1] * tile**2 + video * ((tile / stride) ** 2 + 3)),
        kept=KINDS * tokens * config.num_attention_heads * config.attention_head_dim * 2,
    )


def size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def largest(name: str) -> tuple[int, int]:
    """Of a bucket's frames, or of WIDTHxHEIGHT: (height, width)."""
    if name in BUCKETS:
        return max(BUCKETS[name].values(), key=lambda bucket: bucket[0] * bucket[1])
    width, height = name.split("x")
    return int(height), int(width)


def table(model: Model) -> Iterator[str]:
    """Markdown, line by line."""

    def row(*cells: object) -> str:
        return f"| {' | '.join(f'{cell / GB:.2f}' if isinstance(cell, int) else str(cell) for cell in cells)} |"

    def head(*cells: str) -> list[str]:
        return [row(*cells), "|" + "---|" * len(cells)]

    kinds = tuple(model.parameters)
    yield from head("weights, GB", *kinds)
    audio = {f"audio branch `{name}`": [model.transformer(kind, f".{name}.") for kind in kinds] for name in BRANCHES}
    whole = [model.transformer(kind) for kind in kinds]
    base = [all_of_it - sum(branches) for all_of_it, *branches in zip(whole, *audio.values(), strict=True)]
    yield row("transformer without audio", *base)
    for title, both in audio.items():
        yield row(title, *both)
    yield row("of these three: one block", *(model.transformer(kind, "blocks.0.") for kind in kinds))
    yield row("what is in no block", *(model.transformer(kind) - model.transformer(kind, "blocks.") for kind in kinds))
    for title, nbytes in (
        ("T5", model.text),
        ("CLIP, visual half, float16", model.image),
        ("VAE, float32", model.vae),
        ("speech encoder, float32", model.speech),
    ):
        yield row(title, nbytes, "")

    yield ""
    yield from head(
        "beside the weights, GB", *(f"{name} ({'x'.join(map(str, largest(name)[::-1]))})" for name in SIZES)
    )
    for title, take in (
        ("a forward of the transformer", lambda took: took.forward),
        ("with 8-bit weights", lambda took: took.forward_8_bit),
        ("encoding 81 frames", lambda took: took.encoding),
        ("decoding them whole", lambda took: took.decoding),
        ("decoding them in tiles, at most", lambda took: took.in_tiles),
        ("kept meanwhile by TeaCache", lambda took: took.kept),
    ):
        yield row(title, *map(take, model.activations.values()))

    yield ""
    needed = (f"needs at {name}" for name in SIZES)
    yield from head("preset", "always on the GPU", "in the machine's memory", *needed, "left at 720p", "tiles above")
    for preset in PRESETS.values():
        for kind in kinds:
            needs = [model.needs(preset, name, kind) for name in SIZES]
            yield row(
                preset.name if kind == "bfloat16" else f"{preset.name}, {kind} weights",
                model.on_gpu(preset, kind),
                model.in_machine(preset, kind),
                *needs,
                int(preset.name.removesuffix("gb")) * GB - needs[1],
                preset.whole_up_to or "none",
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of the three snapshots")
    options = parser.parse_args(arguments)
    try:
        model = Model(published() if options.models is None else stored(options.models))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(model)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
