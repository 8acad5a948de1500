"""How fast is the model on a GPU, part by part, and what memory does it take? Prints Markdown.

    python -m benchmarks.gpu [SECTION ...] [--sizes 640x640 960x960] [--steps 2] [--models DIR]

Weights are random: made on the device, in the published shapes, for the product's own modules, so that nothing has to
be downloaded and no file of 65 GB be written. Speed does not depend on their values, but for a few per cent through the
card's power. `--models` measures the snapshots in DIR instead, and `--device cpu --models TINY --sizes 64x64` shows
without a GPU that everything runs. Each table is printed as it is ready.
"""

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from avatar_api.video_writer import VideoWriter
from benchmarks.markdown import row, table
from infinitetalk import checkpoints, memory
from infinitetalk.audio import encode
from infinitetalk.color import match_color
from infinitetalk.memory import GB, PRESETS
from infinitetalk.pipeline import InfiniteTalkPipeline, Speaker, Step
from infinitetalk.quantization import Quantization, quantize
from infinitetalk.settings import Settings
from scripts import make_tiny_snapshots as snapshots
from scripts import memory_presets

FRAMES, LATENT_FRAMES = 81, 21
SOME_BLOCKS = 8
"""Of the transformer's 40, where variants are compared: what differs between them is in the blocks, all alike."""
BACKENDS = (
    "native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "sage", "xformers",
)  # fmt: skip
CARD_MEMORY = {"141gb": None, "80gb": 80e9, "48gb": 47.8e9, "24gb": 23.7e9}
"""What a small card of each preset has, in bytes; None: all there is. The H100, the L40S and the L4 tell so much."""


class Bench(NamedTuple):
    pipeline: InfiniteTalkPipeline
    sizes: list[tuple[int, int]]
    """(height, width)"""
    steps: int

    @property
    def device(self) -> torch.device:
        return self.pipeline.device


# Measuring.


class Taken(NamedTuple):
    seconds: float
    peak: int
    """Bytes at the most, beside what there was before."""
    most: int
    """Bytes of all tensors together, at the most."""
    reserved: int
    """Bytes that torch's allocator held at the most, in all."""


def machine_memory_used() -> int:
    """Linux only: bytes."""
    lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    kilobytes = {name: int(value.split()[0]) for name, value in lines}
    return 1024 * (kilobytes["MemTotal"] - kilobytes["MemAvailable"])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The median; the first call, which also loads kernels, does not count."""
    times = []
    for _ in range(1 + repeats):
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begun)
        if times[0] > 8:  # minutes would tell no more
            break
    return statistics.median(times[1:] or times)


def taken(call: Callable[[], object], device: torch.device, repeats: int = 3) -> Taken:
    if device.type != "cuda":
        return Taken(seconds(call, device, repeats), 0, 0, 0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    took = seconds(call, device, repeats)
    most = torch.cuda.max_memory_allocated(device)
    return Taken(took, most - before, most, torch.cuda.max_memory_reserved(device))


def difference(output: Tensor, expected: Tensor) -> str:
    """In per cent: relative L2, and the largest error over the largest value."""
    if torch.equal(output, expected):
        return "none"
    gap, expected = output.float() - expected.float(), expected.float()
    relative, largest = (gap.norm() / expected.norm()).item(), (gap.abs().max() / expected.abs().max()).item()
    return f"{100 * relative:.2f}, {100 * largest:.2f}"


# Models and what they are given.


@torch.no_grad()
def random_weights(module: nn.Module, device: torch.device) -> Any:
    """Give a module without storage random weights on a device, of a scale that keeps activations in bounds."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.ndim > 1:
                value.normal_(std=max(1, parameter[0].numel()) ** -0.5)
            else:
                value.fill_(name == "weight")
            setattr(owner, name, nn.Parameter(value, requires_grad=False))
    return module.to(device).eval()


def random_pipeline(device: torch.device) -> InfiniteTalkPipeline:
    """The published shapes, all on the device."""
    torch.manual_seed(0)
    transformer, vae, text_encoder, image_encoder, speech_encoder = (
        random_weights(module, device) for module in memory_presets.published_shapes()
    )
    with tempfile.TemporaryDirectory() as folder:
        snapshots.write_wan_configs(Path(folder))
        tokenizer = checkpoints.load_tokenizer(Path(folder))
    return InfiniteTalkPipeline(
        transformer, vae, text_encoder, tokenizer, image_encoder, speech_encoder, PRESETS["141gb"]
    )


def stored_pipeline(folder: Path, device: torch.device) -> InfiniteTalkPipeline:
    wan, infinitetalk, wav2vec2 = (
        folder / name for name in ("Wan2.1-I2V-14B-480P", "InfiniteTalk", "chinese-wav2vec2-base")
    )
    return InfiniteTalkPipeline.from_snapshots(wan, infinitetalk, wav2vec2, device)


def given(pipeline: InfiniteTalkPipeline, size: tuple[int, int], speakers: int, batch: int = 1) -> dict[str, Any]:
    """A forward's arguments; no speakers: the silence that a step's third pass hears."""
    (height, width), config, device = size, pipeline.transformer.config, pipeline.device
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=pipeline.dtype, device=device, generator=generator)

    audio = noise(max(1, speakers), FRAMES, config.audio_window, 1, config.audio_features)
    regions = torch.zeros(2, height // 16, width // 16, dtype=torch.bool, device=device)
    regions[0, :, : width // 32], regions[1, :, width // 32 :] = True, True
    return {
        "hidden_states": noise(config.in_channels, LATENT_FRAMES, height // 8, width // 8),
        "timestep": torch.full((batch,), 900.0, device=device),
        "encoder_hidden_states": noise(512, config.text_dim),
        "encoder_hidden_states_image": noise(257, config.image_dim),
        "audio": audio if speakers else torch.zeros_like(audio),
        "branch": "multi" if speakers == 2 else "single",
        "regions": regions if speakers == 2 else None,
    }


def forward_operations(pipeline: InfiniteTalkPipeline, size: tuple[int, int]) -> float:
    """Multiplications and additions of a forward for one speaker, those of the matrix products alone."""
    config = pipeline.transformer.config
    tokens, dim = LATENT_FRAMES * size[0] * size[1] // 256, config.num_attention_heads * config.attention_head_dim
    context = 512 + 257
    # Per token: q, k, v, o of itself; q, o of the text and of the voice; the feed-forward part. And the attentions.
    linear = 2 * tokens * (8 * dim**2 + 2 * dim * config.ffn_dim)
    linear += 2 * context * 2 * dim**2
    attention = 4 * tokens * dim * (tokens + context + config.audio_tokens)
    return float(len(pipeline.transformer.blocks) * (linear + attention))


@contextmanager
def some_blocks(pipeline: InfiniteTalkPipeline) -> Iterator[None]:
    whole = pipeline.transformer.blocks
    pipeline.transformer.blocks = whole[:SOME_BLOCKS]
    yield
    pipeline.transformer.blocks = whole


# The sections.


def ceilings(bench: Bench) -> None:
    """What the machine can do at best."""
    device, side = bench.device, 8192 if bench.device.type == "cuda" else 256
    first, second = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    many = side**3 // 8 if device.type == "cuda" else side**2
    large, other = (torch.empty(many // 64, dtype=torch.uint8, device=device) for _ in range(2))
    table("ceiling", "")
    product = torch.empty_like(first)
    took = seconds(lambda: [torch.mm(first, second, out=product) for _ in range(200)], device) / 200
    row("bfloat16 matrix product, 8192 x 8192 x 8192, TFLOP/s", 2 * side**3 / took / 1e12)
    took = seconds(lambda: [other.copy_(large) for _ in range(10)], device) / 10
    row("copy on the device, read and written, GB/s", 2 * large.nbytes / took / 1e9)
    pageable = torch.zeros(large.nbytes, dtype=torch.uint8)
    row("from the machine's memory, GB/s", large.nbytes / seconds(lambda: large.copy_(pageable), device) / 1e9)
    row("to the machine's memory, GB/s", large.nbytes / seconds(lambda: pageable.copy_(large), device) / 1e9)
    if device.type == "cuda":
        pinned = pageable.pin_memory()
        took = seconds(lambda: large.copy_(pinned, non_blocking=True), device)
        row("from pinned memory, GB/s", large.nbytes / took / 1e9)


def forward(bench: Bench) -> None:
    """One pass of the transformer."""
    pipeline, device = bench.pipeline, bench.device
    table("a forward", "size", "s", "TFLOP/s", "host s", "peak GB beside the weights", "counted GB")
    counted = memory_presets.published().transformer
    counted.blocks = counted.blocks[:2]
    for size in bench.sizes:
        reckoned = memory_presets.peak_bytes(lambda: counted(*memory_presets.two_speakers(counted, *size)))  # noqa: B023
        for name, speakers in (("one speaker", 1), ("silence", 0), ("two speakers", 2)):
            if size != bench.sizes[0] and not speakers:
                continue
            arguments = given(pipeline, size, speakers)
            took = taken(lambda: pipeline.transformer(**arguments), device, repeats=2)  # noqa: B023
            begun = time.perf_counter()
            host = 0.0
            if size == bench.sizes[0]:
                pipeline.transformer(**arguments)
                host = time.perf_counter() - begun
                synchronize(device)
            rate = forward_operations(pipeline, size) / took.seconds / 1e12
            row(
                name, text(size), took.seconds, rate, host or "", took.peak / GB, reckoned / GB if speakers == 2 else ""
            )
    with some_blocks(pipeline):
        one, three = (given(pipeline, bench.sizes[0], 1, batch) for batch in (1, 3))
        single, batched = (seconds(lambda: pipeline.transformer(**of), device) for of in (one, three))  # noqa: B023
        row(f"a batch of three, {SOME_BLOCKS} blocks, over three forwards", text(bench.sizes[0]), batched / single / 3)


def parts(bench: Bench) -> None:
    """Everything but the transformer."""
    pipeline, device = bench.pipeline, bench.device
    generator = torch.Generator(device).manual_seed(0)
    encoding, decoding = memory_presets.vae_per_pixel(memory_presets.published().vae)  # cuDNN's share not counted
    table("part", "size", "s", "peak GB beside the weights", "counted GB")

    def measure(
        name: str, size: tuple[int, int] | None, call: Callable[[], object], counted: float | None = None
    ) -> None:
        took = taken(call, device, repeats=1)
        row(name, text(size) if size else "", took.seconds, took.peak / GB, "" if counted is None else counted / GB)

    measure("T5, one prompt", None, lambda: pipeline.encode_prompt("A person talks."))
    for length in (10, 120, 140):
        samples = torch.randn(16000 * length)
        measure(f"wav2vec2, {length} s of voice", None, lambda: encode(pipeline.speech_encoder, samples, 25 * length))  # noqa: B023
    for size in bench.sizes:
        height, width = size
        video = torch.rand(3, FRAMES, height, width, device=device, generator=generator) * 2 - 1
        latents = torch.randn(16, LATENT_FRAMES, height // 8, width // 8, device=device, generator=generator)
        measure("CLIP", size, lambda: pipeline.encode_picture(video[:, 0]))  # noqa: B023
        for frames in (1, 9, FRAMES):
            whole = encoding * height * width if frames == FRAMES else None
            measure(f"VAE, {frames} frames encoded", size, lambda: pipeline.encode_video(video[:, :frames]), whole)  # noqa: B023
        measure("VAE, 81 frames decoded", size, lambda: pipeline.vae.decode(latents[None]), decoding * height * width)  # noqa: B023
        measure("VAE, 81 frames decoded in tiles", size, lambda: pipeline.vae.tiled_decode(latents[None]))  # noqa: B023
        measure("colours", size, lambda: match_color(video, video[:, 0], 1.0))  # noqa: B023
        measure("noise", size, lambda: torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(0)))  # noqa: B023
        measure("81 frames to the machine's memory", size, lambda: video.cpu())  # noqa: B023


def vae(bench: Bench) -> None:
    """Other ways to compute the same convolutions."""
    pipeline, device, size = bench.pipeline, bench.device, bench.sizes[0]
    generator = torch.Generator(device).manual_seed(0)
    latents = torch.randn(1, 16, LATENT_FRAMES, size[0] // 8, size[1] // 8, device=device, generator=generator)
    video = torch.rand(1, 3, FRAMES, *size, device=device, generator=generator) * 2 - 1
    usual: list[Tensor] = []
    table("VAE", "encode s", "GB", "decode s", "GB", "decoded differently, %")

    def measure(name: str) -> None:
        encoded, decoded = (
            taken(lambda: pipeline.vae.encode(video), device, 2),
            taken(lambda: pipeline.vae.decode(latents), device, 2),
        )
        output = pipeline.vae.decode(latents).sample
        usual[:] = usual or [output]
        row(name, encoded.seconds, encoded.peak / GB, decoded.seconds, decoded.peak / GB, difference(output, usual[0]))

    measure("as it is")
    with ExitStack() as undo:
        torch.backends.cudnn.allow_tf32 = False
        undo.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
        measure("without TF32")
    torch.backends.cudnn.benchmark = True
    measure("cudnn.benchmark")
    torch.backends.cudnn.benchmark = False


def attention(bench: Bench) -> None:
    """Ways to compute the self-attention, by diffusers' names."""
    config, device = bench.pipeline.transformer.config, bench.device
    generator = torch.Generator(device).manual_seed(0)
    table("attention", "size", "ms", "TFLOP/s", "differs from native, %")
    for size in bench.sizes:
        tokens = LATENT_FRAMES * size[0] * size[1] // 256
        shape = (1, tokens, config.num_attention_heads, config.attention_head_dim)
        query, key, value = (
            torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator) for _ in range(3)
        )
        expected = None
        for name in BACKENDS:
            call = lambda: dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))  # noqa: B023, E731
            try:
                output = call()
            except Exception as error:  # whatever is not installed, or not for this card
                row(name, text(size), f"not here: {type(error).__name__}", "", "")
                continue
            expected = output if expected is None else expected
            took = seconds(call, device, 2)
            rate = 4 * tokens**2 * shape[2] * shape[3] / took / 1e12
            row(name, text(size), 1000 * took, rate, difference(output, expected))


def whole_attention(bench: Bench) -> None:
    """The same inside the transformer."""
    pipeline, device, size = bench.pipeline, bench.device, bench.sizes[0]
    arguments = given(pipeline, size, 1)
    table(f"attention in {SOME_BLOCKS} blocks", "s", "differs, %")
    with some_blocks(pipeline):
        usual = pipeline.transformer(**arguments)
        row("as it is", seconds(lambda: pipeline.transformer(**arguments), device), "")
        for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with suppress(RuntimeError), sdpa_kernel(kind):
                output = pipeline.transformer(**arguments)
                row(kind.name, seconds(lambda: pipeline.transformer(**arguments), device), difference(output, usual))


def compiled(bench: Bench) -> None:
    """torch.compile of the blocks."""
    pipeline, device, size = bench.pipeline, bench.device, bench.sizes[0]
    table(f"{SOME_BLOCKS} blocks", "first call s", "s", "differs, %")
    with some_blocks(pipeline), ExitStack() as undo:
        for block in pipeline.transformer.blocks:
            undo.callback(setattr, block, "_compiled_call_impl", None)
        arguments = given(pipeline, size, 1)
        usual = pipeline.transformer(**arguments)
        row("as it is", "", seconds(lambda: pipeline.transformer(**arguments), device), "")
        for name, options in (("compiled", {}), ("compiled, any size", {"dynamic": True})):
            torch.compiler.reset()
            pipeline.transformer.compile_repeated_blocks(fullgraph=True, **options)
            begun = time.perf_counter()
            try:
                output = pipeline.transformer(**arguments)
            except Exception as error:
                row(name, str(error)[:200].replace("\n", " "), "", "")
                continue
            synchronize(device)
            first = time.perf_counter() - begun
            took = seconds(lambda: pipeline.transformer(**arguments), device)
            row(name, first, took, difference(output, usual))


def eight_bit(bench: Bench) -> None:
    """Weights of one byte, in copies of some blocks."""
    pipeline, device, size = bench.pipeline, bench.device, bench.sizes[0]
    arguments = given(pipeline, size, 1)
    table(f"{SOME_BLOCKS} blocks", "s", "differs, %", "quantising s")
    with some_blocks(pipeline):
        kept = pipeline.transformer.blocks
        usual = pipeline.transformer(**arguments)
        row("bfloat16", seconds(lambda: pipeline.transformer(**arguments), device), "", "")
        kinds: tuple[Quantization, ...] = ("fp8", "int8")
        for kind in kinds:
            pipeline.transformer.blocks = copy.deepcopy(kept)
            begun = time.perf_counter()
            quantize(pipeline.transformer, kind)
            synchronize(device)
            quantising = time.perf_counter() - begun
            output = pipeline.transformer(**arguments)
            took = seconds(lambda: pipeline.transformer(**arguments), device)
            row(kind, took, difference(output, usual), quantising)
            pipeline.transformer.compile_repeated_blocks(fullgraph=True)
            output = pipeline.transformer(**arguments)
            took = seconds(lambda: pipeline.transformer(**arguments), device)
            row(f"{kind}, compiled", took, difference(output, usual), "")
            torch.compiler.reset()
        pipeline.transformer.blocks = kept


def profile(bench: Bench) -> None:
    """Which kernels a forward is spent in."""
    pipeline, device = bench.pipeline, bench.device
    if device.type != "cuda":
        return
    for size, speakers in ((bench.sizes[0], 1), (bench.sizes[0], 2)):
        arguments = given(pipeline, size, speakers)
        with some_blocks(pipeline):
            pipeline.transformer(**arguments)
            synchronize(device)
            activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as profiled:
                pipeline.transformer(**arguments)
                synchronize(device)
        kernels = [
            event
            for event in profiled.key_averages()
            if event.self_device_time_total > 0 and event.device_type.name != "CPU"
        ]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        whole = sum(event.self_device_time_total for event in kernels)
        table(f"kernel, {text(size)}, {speakers} speaker(s), {SOME_BLOCKS} blocks", "calls", "ms", "%")
        for event in kernels[:24]:
            name = event.key.replace("|", "/")[:150]
            row(name, event.count, event.self_device_time_total / 1000, 100 * event.self_device_time_total / whole)


def clip(bench: Bench) -> None:
    """A whole video of two clips, as the service makes it, and what a published clip of 40 steps comes to."""
    pipeline, device = bench.pipeline, bench.device
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    voice = (0.1 * np.random.default_rng(1).standard_normal(150 * 640)).astype(np.float32)
    table("a clip", "of", "before the steps s", "a step s", "after them s", "written s", "40 steps s", "reserved GB")
    for size in bench.sizes:
        settings = Settings(size=f"{size[1]}x{size[0]}", steps=bench.steps)
        marks: list[float] = []

        def on_step(step: Step) -> None:
            synchronize(device)
            marks.append(time.perf_counter())  # noqa: B023

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            for made in pipeline.generate(picture, [Speaker(voice)], "A person talks.", settings, on_step=on_step):
                ended = time.perf_counter()
                with VideoWriter(Path(folder) / f"{made.index}.mp4", size[1], size[0], sound=None) as writer:
                    writer.write(made.frames)
                written = time.perf_counter() - ended
                step = (marks[-1] - marks[0]) / max(1, len(marks) - 1)
                before, after = marks[0] - begun - step, ended - marks[-1]
                reserved = torch.cuda.max_memory_reserved(device) / GB if device.type == "cuda" else 0.0
                whole = before + 40 * step + after + written
                row(text(size), f"{made.index + 1} of {made.clips}", before, step, after, written, whole, reserved)
                marks.clear()
                begun = time.perf_counter()


def presets(bench: Bench) -> None:
    """The memory presets, each within as much memory as a small card of its kind has. Leaves an offloaded model."""
    pipeline, device = bench.pipeline, bench.device
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    memory_columns = "tensors GB", "reserved GB"
    table("preset", "size", "of GB", "a forward s", *memory_columns, "a clip's rest s", *memory_columns)
    encoders = pipeline.text_encoder, pipeline.image_encoder
    for name, preset in PRESETS.items():
        pipeline.preset = preset
        if preset.offload_encoders:
            for encoder in encoders:
                encoder.to("cpu")
        if preset.offload_blocks and not hasattr(pipeline.transformer.blocks[0], "_diffusers_hook"):
            begun = time.perf_counter()
            pipeline.transformer.to("cpu")
            between = time.perf_counter()
            memory.offload_blocks(pipeline.transformer, device)
            used = machine_memory_used() / GB
            moved, pinned = between - begun, time.perf_counter() - between
            print(f"(moved in {moved:.1f} s, pinned in {pinned:.1f} s, {used:.0f} GB of the machine's memory used)")
        gc.collect()
        torch.cuda.empty_cache()
        limit = CARD_MEMORY[name]
        context = total - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - context) / total), device)
        for size in (bench.sizes[0], memory_presets.largest("720p")):
            try:
                took = taken(lambda: pipeline.transformer(**given(pipeline, size, 2)), device, 1)  # noqa: B023
                rest = taken(lambda: everything_else(pipeline, size), device, 1)  # noqa: B023
                measured = (took.seconds, took.most / GB, took.reserved / GB)
                figures: Sequence[object] = (*measured, rest.seconds, rest.most / GB, rest.reserved / GB)
            except torch.OutOfMemoryError as error:
                figures = (str(error)[:120], *[""] * 5)
            row(name, text(size), (limit or total) / GB, *figures)
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    print(f"\nbeside torch's allocator: {context / GB:.2f} GB", flush=True)


def everything_else(pipeline: InfiniteTalkPipeline, size: tuple[int, int]) -> None:
    """What a clip takes beside its forwards; T5 and CLIP only in the first."""
    video = torch.rand(3, FRAMES, *size, device=pipeline.device) * 2 - 1
    pipeline.encode_prompt("A person talks.")
    pipeline.encode_picture(video[:, 0])
    pipeline.encode_video(video)
    latents = pipeline.encode_video(video[:, :9])
    latents = torch.randn(16, LATENT_FRAMES, *latents.shape[2:], device=pipeline.device)
    match_color(pipeline.decode_video(latents), video[:, 0], 1.0)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    section.__name__: section
    for section in (
        ceilings,
        forward,
        profile,
        attention,
        whole_attention,
        parts,
        vae,
        clip,
        compiled,
        eight_bit,
        presets,
    )
}


def text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--sizes", nargs="+", default=["640x640", "960x960"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=2, help="of the clips that are made (2)")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of the three snapshots")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    begun = time.perf_counter()
    pipeline = random_pipeline(device) if options.models is None else stored_pipeline(options.models, device)
    synchronize(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, models ready after {time.perf_counter() - begun:.1f} s")
    sizes = [memory_presets.largest(size) for size in options.sizes]
    with torch.inference_mode(False), torch.no_grad():
        for name in options.sections or SECTIONS:
            begun = time.perf_counter()
            SECTIONS[name](Bench(pipeline, sizes, options.steps))
            print(f"\n({name}: {time.perf_counter() - begun:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
