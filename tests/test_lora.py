"""LoRAs in every layout that is about: merged for good, or there for a while and gone without a trace."""

import copy
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infinitetalk import checkpoints
from infinitetalk.errors import CheckpointError
from infinitetalk.lora import Lora, applied, merge, read_lora
from infinitetalk.quantization import Quantization, quantize
from infinitetalk.settings import FEW_STEPS, Settings
from infinitetalk.transformer import InfiniteTalkTransformer3DModel
from tests.conftest import GOLDENS

CPU = torch.device("cpu")
RANK = 4

BLOCKS = {  # Wan2.1's name → diffusers' name, of linear layers that every trainer knows
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.0.cross_attn.k": "blocks.0.attn2.to_k",
    "blocks.2.cross_attn.v_img": "blocks.2.attn2.add_v_proj",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.2.ffn.2": "blocks.2.ffn.net.2",
}
OTHERS = {  # of those that only extracted LoRAs have
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}
WHOLE = {  # of what is too small or too odd for factors
    "blocks.0.norm3": "blocks.0.norm2",
    "blocks.1.self_attn.norm_k": "blocks.1.attn1.norm_k",
    "blocks.2.cross_attn.norm_k_img": "blocks.2.attn2.norm_added_k",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "patch_embedding": "patch_embedding",
    "head.head": "proj_out",
}
MODULATIONS = {"blocks.1": "blocks.1.scale_shift_table", "head": "scale_shift_table"}

Tensors = dict[str, Tensor]


def load(dtype: torch.dtype = torch.float32) -> InfiniteTalkTransformer3DModel:
    folder = GOLDENS / "ckpt_tiny"
    return checkpoints.load_transformer(folder, folder / "infinitetalk.safetensors", CPU, dtype)


@pytest.fixture(scope="module")
def untouched() -> InfiniteTalkTransformer3DModel:
    return load()


@pytest.fixture
def model(untouched: InfiniteTalkTransformer3DModel) -> InfiniteTalkTransformer3DModel:
    return copy.deepcopy(untouched)


def weights(model: nn.Module) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def changed(first: Tensors, second: Tensors) -> set[str]:
    return {name for name in first if not torch.equal(first[name], second[name])}


@torch.no_grad()
def forward(model: InfiniteTalkTransformer3DModel) -> Tensor:
    random = torch.Generator().manual_seed(1)
    config = model.config
    latents = torch.randn(1, config.in_channels, 2, 8, 8, generator=random)
    text = torch.randn(1, 512, config.text_dim, generator=random)
    picture = torch.randn(1, 257, config.image_dim, generator=random)
    dtype = model.patch_embedding.weight.dtype
    prediction: Tensor = model(latents.to(dtype), torch.tensor([700.0]), text.to(dtype), picture.to(dtype))
    return prediction


def factors(model: nn.Module, names: dict[str, str], seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Wan2.1's name → up, down and the bias' difference, which together move a layer's output by about a tenth."""
    random = torch.Generator().manual_seed(seed)
    drawn = {}
    for published, library in names.items():
        outputs, inputs = model.get_parameter(f"{library}.weight").shape
        up = torch.randn(outputs, RANK, generator=random) * 0.1 / RANK**0.5
        down = torch.randn(RANK, inputs, generator=random) / inputs**0.5
        drawn[published] = up, down, torch.randn(outputs, generator=random) * 0.1
    return drawn


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def extracted(model: nn.Module, path: Path, seed: int = 0) -> tuple[Path, Tensors]:
    """A LoRA such as lightx2v's and FusionX, extracted from a tuned model; and what it adds to which parameter."""
    random = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    added: Tensors = {}
    for published, (up, down, bias) in factors(model, BLOCKS | OTHERS, seed).items():
        library = (BLOCKS | OTHERS)[published]
        tensors[f"diffusion_model.{published}.lora_up.weight"] = 2 * up
        tensors[f"diffusion_model.{published}.lora_down.weight"] = down
        tensors[f"diffusion_model.{published}.alpha"] = torch.tensor(RANK / 2)
        tensors[f"diffusion_model.{published}.diff_b"] = bias
        added |= {f"{library}.weight": up @ down, f"{library}.bias": bias}
    for names, kind, leaf in ((WHOLE, "diff", ".weight"), (MODULATIONS, "diff_m", "")):
        for published, library in names.items():
            difference = torch.randn(model.get_parameter(library + leaf).shape, generator=random) * 0.02
            tensors[f"diffusion_model.{published}.{kind}"] = added[library + leaf] = difference
    return write(path, tensors), added


@pytest.fixture
def lora(untouched: InfiniteTalkTransformer3DModel, tmp_path: Path) -> Lora:
    return read_lora(extracted(untouched, tmp_path / "extracted.safetensors")[0])


# Merged.


def test_merged_weights_are_those_of_the_published_code(model: InfiniteTalkTransformer3DModel) -> None:
    details = json.loads((GOLDENS / "lora" / "merged.json").read_text())
    tensors = load_file(GOLDENS / "lora" / "merged.safetensors")
    merged = convert_wan_transformer_to_diffusers(tensors)
    before = weights(model)
    merge(model, read_lora(GOLDENS / "lora" / "lora.safetensors", reference_quirks=True), details["alpha"])
    assert changed(before, weights(model)) == set(merged)
    for name, expected in merged.items():
        torch.testing.assert_close(model.get_parameter(name).data, expected, rtol=0, atol=1e-6)


def test_alpha_counts_unless_the_published_code_is_to_be_followed() -> None:
    file = GOLDENS / "lora" / "lora.safetensors"  # of rank 4 and alpha 2
    for quirks, strength in ((False, 0.5), (True, 1.0)):
        deltas = read_lora(file, quirks).deltas
        assert {delta.strength for delta in deltas if len(delta.factors) == 2} == {strength}
        assert {delta.strength for delta in deltas if len(delta.factors) == 1} == {1.0}


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_merged_while_loading_is_as_merged_afterwards(
    model: InfiniteTalkTransformer3DModel, lora: Lora, tmp_path: Path, quantization: Quantization | None
) -> None:
    folder, other = GOLDENS / "ckpt_tiny", read_lora(extracted(model, tmp_path / "other.safetensors", seed=1)[0])
    loras = [(lora, 0.7), (other, -0.3)]
    loaded = checkpoints.load_transformer(
        folder, folder / "infinitetalk.safetensors", CPU, torch.float32, quantization, loras
    )
    for one, scale in loras:
        merge(model, one, scale)
    if quantization:
        quantize(model, quantization)
    assert torch.equal(forward(loaded), forward(model))


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_everything_in_an_extracted_lora_is_added(
    model: InfiniteTalkTransformer3DModel, tmp_path: Path, scale: float
) -> None:
    path, added = extracted(model, tmp_path / "lora.safetensors")
    before, places = weights(model), {name: value.data_ptr() for name, value in model.named_parameters()}
    merge(model, read_lora(path), scale)
    for name, value in weights(model).items():
        expected = before[name] + scale * added[name] if name in added else before[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6 if name in added else 0)
    assert places == {name: value.data_ptr() for name, value in model.named_parameters()}


@pytest.mark.parametrize("names", ["published", "diffusers"])
def test_every_base_parameter_is_known_by_its_names(
    model: InfiniteTalkTransformer3DModel, tmp_path: Path, names: str
) -> None:
    """Against the library's own converter, on the names in the published file."""
    published = json.loads((GOLDENS / "ckpt_tiny/diffusion_pytorch_model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    library = convert_wan_transformer_to_diffusers({name: name for name in published})
    tensors, expected = {}, weights(model)
    for number, (name, source) in enumerate(library.items()):
        module, _, leaf = (name if names == "diffusers" else source).rpartition(".")
        if leaf in ("modulation", "scale_shift_table"):
            module, leaf = (source.rpartition(".")[0], "modulation")
        kind = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
        tensors[f"diffusion_model.{module}.{kind}"] = torch.full_like(expected[name], 1 + number)
        expected[name] = expected[name] + (1 + number)
    merge(model, read_lora(write(tmp_path / "lora.safetensors", tensors)), 1.0)
    assert same(weights(model), expected)
    assert len(tensors) == len(published) > 80


def peft(module: str, up: Tensor, down: Tensor) -> Tensors:
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


LAYOUTS: dict[str, Callable[[str, str, Tensor, Tensor], Tensors]] = {
    "published names, lora_down and lora_up": lambda wan, _, up, down: {
        f"diffusion_model.{wan}.lora_down.weight": down,
        f"diffusion_model.{wan}.lora_up.weight": up,
    },
    "published names, lora_A and lora_B": lambda wan, _, up, down: peft(f"diffusion_model.{wan}", up, down),
    "published names, no prefix, PEFT's adapter name": lambda wan, _, up, down: {
        f"{wan}.lora_A.default.weight": down,
        f"{wan}.lora_B.default.weight": up,
    },
    "diffusers": lambda _, library, up, down: peft(f"transformer.{library}", up, down),
    "diffusers' names by PEFT": lambda _, library, up, down: peft(f"base_model.model.{library}", up, down),
    "alpha": lambda wan, _, up, down: {
        f"diffusion_model.{wan}.lora_down.weight": down,
        f"diffusion_model.{wan}.lora_up.weight": 4 * up,
        f"diffusion_model.{wan}.alpha": torch.tensor(RANK / 4),
    },
    "kohya": lambda wan, _, up, down: {
        f"lora_unet_{wan.replace('.', '_')}.lora_down.weight": down,
        f"lora_unet_{wan.replace('.', '_')}.lora_up.weight": 2 * up,
        f"lora_unet_{wan.replace('.', '_')}.alpha": torch.tensor(RANK / 2),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(model: InfiniteTalkTransformer3DModel, tmp_path: Path, layout: str) -> None:
    drawn = factors(model, BLOCKS, seed=3)
    tensors: Tensors = {}
    for wan, (up, down, _) in drawn.items():
        tensors |= LAYOUTS[layout](wan, BLOCKS[wan], up, down)
    before = weights(model)
    merge(model, read_lora(write(tmp_path / "lora.safetensors", tensors)), 0.8)
    assert changed(before, weights(model)) == {f"{library}.weight" for library in BLOCKS.values()}
    for wan, (up, down, _) in drawn.items():
        name = f"{BLOCKS[wan]}.weight"
        torch.testing.assert_close(model.get_parameter(name).data, before[name] + 0.8 * up @ down, rtol=0, atol=1e-6)


def test_diffusers_metadata_tell_alpha(tmp_path: Path) -> None:
    tensors = peft("transformer.blocks.0.attn1.to_q", torch.ones(128, RANK), torch.ones(RANK, 128))

    def read(**config: object) -> Lora:
        text = json.dumps({f"transformer.{name}": value for name, value in config.items()})
        return read_lora(write(tmp_path / "lora.safetensors", tensors, {"lora_adapter_metadata": text}))

    assert read(r=RANK, lora_alpha=RANK / 2, use_rslora=False, alpha_pattern={}).deltas[0].strength == 0.5
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: .*use_rslora, which is not supported"):
        read(r=RANK, lora_alpha=RANK, use_rslora=True)
    with pytest.raises(CheckpointError, match=r"lora\.safetensors: its lora_adapter_metadata cannot be read"):
        read(r=0, lora_alpha=RANK)


def test_a_convolution_may_come_as_factors(model: InfiniteTalkTransformer3DModel, tmp_path: Path) -> None:
    outputs, *inputs = model.patch_embedding.weight.shape
    up, down = torch.randn(outputs, RANK, 1, 1, 1), torch.randn(RANK, *inputs)
    tensors = {"patch_embedding.lora_up.weight": up, "patch_embedding.lora_down.weight": down}
    before = model.patch_embedding.weight.detach().clone()
    merge(model, read_lora(write(tmp_path / "lora.safetensors", tensors)), 1.0)
    expected = before + torch.einsum("or,r...->o...", up.flatten(1), down)
    torch.testing.assert_close(model.patch_embedding.weight.data, expected)


def test_merging_rounds_once_to_the_type_of_each_weight(tmp_path: Path) -> None:
    model = load(torch.bfloat16)
    path, added = extracted(model, tmp_path / "lora.safetensors")
    before = weights(model)
    merge(model, read_lora(path), 1.0)
    after = weights(model)
    for name, added_in_float32 in added.items():
        assert after[name].dtype == before[name].dtype
        exact = before[name].float() + added_in_float32
        torch.testing.assert_close(after[name], exact.to(before[name].dtype), rtol=2**-8, atol=1e-6)
    assert {str(after[name].dtype) for name in added} == {"torch.bfloat16", "torch.float32"}


@pytest.mark.parametrize("quantization", ["fp8", "int8", None])
def test_nothing_is_merged_into_a_quantised_model(
    model: InfiniteTalkTransformer3DModel, lora: Lora, quantization: Quantization | None
) -> None:
    if quantization:
        quantize(model, quantization)
    else:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    before = forward(model)
    with pytest.raises(TypeError, match=r"blocks\..*\.weight is quantised: merge LoRAs before"):
        merge(model, lora, 1.0)
    assert torch.equal(forward(model), before)


# There for a while.


def test_applied_is_as_good_as_merged_and_leaves_no_trace(model: InfiniteTalkTransformer3DModel, lora: Lora) -> None:
    before, plain = weights(model), forward(model)
    small = {f"{library}.weight" for library in WHOLE.values() if library != "proj_out"} | set(MODULATIONS.values())
    with applied(model, [(lora, 0.9)]):
        assert changed(before, weights(model)) == small  # no linear layer's
        with_lora = forward(model)
    assert same(weights(model), before)
    assert torch.equal(forward(model), plain)

    merge(model, lora, 0.9)
    torch.testing.assert_close(with_lora, forward(model), rtol=0, atol=5e-5)
    assert (with_lora - plain).abs().mean() > 0.01 * plain.abs().mean()


@pytest.mark.parametrize("name", [*BLOCKS, *OTHERS, *WHOLE, *MODULATIONS])
def test_each_part_that_is_applied_is_as_good_as_merged(
    model: InfiniteTalkTransformer3DModel, tmp_path: Path, name: str
) -> None:
    tensors = load_file(extracted(model, tmp_path / "whole.safetensors")[0])
    part = {key: tensor for key, tensor in tensors.items() if key.startswith(f"diffusion_model.{name}.")}
    if name in MODULATIONS:
        part = {f"diffusion_model.{name}.diff_m": tensors[f"diffusion_model.{name}.diff_m"]}
    lora = read_lora(write(tmp_path / "part.safetensors", part))
    plain = forward(model)
    with applied(model, [(lora, 5.0)]):
        with_part = forward(model)
    merge(model, lora, 5.0)
    torch.testing.assert_close(with_part, forward(model), rtol=0, atol=5e-5)
    assert not torch.allclose(with_part, plain, rtol=0, atol=1e-3)


def test_several_loras_add_up(model: InfiniteTalkTransformer3DModel, lora: Lora, tmp_path: Path) -> None:
    other = read_lora(extracted(model, tmp_path / "other.safetensors", seed=7)[0])
    before = weights(model)
    with applied(model, [(lora, 0.5), (other, -0.8)]):
        together = forward(model)
    with applied(model, [(lora, 0.5)]):
        with applied(model, [(other, -0.8)]):
            nested = forward(model)
        alone = forward(model)
    assert same(weights(model), before)
    assert torch.equal(together, nested)
    merge(model, lora, 0.5)
    torch.testing.assert_close(alone, forward(model), rtol=0, atol=5e-5)
    merge(model, other, -0.8)
    torch.testing.assert_close(together, forward(model), rtol=0, atol=5e-5)


def test_one_after_the_other(model: InfiniteTalkTransformer3DModel, lora: Lora) -> None:
    outputs = []
    for scale in (1.0, 0.0, 1.0):
        with applied(model, [(lora, scale)]):
            outputs.append(forward(model))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], forward(model))


def test_an_exception_in_between_leaves_no_trace(model: InfiniteTalkTransformer3DModel, lora: Lora) -> None:
    before, plain = weights(model), forward(model)
    with pytest.raises(KeyboardInterrupt), applied(model, [(lora, 1.0)]):
        forward(model)
        raise KeyboardInterrupt
    assert same(weights(model), before)
    assert torch.equal(forward(model), plain)


def test_gradients_are_on_or_off_as_the_caller_has_them(model: InfiniteTalkTransformer3DModel, lora: Lora) -> None:
    model.requires_grad_(True)
    with applied(model, [(lora, 1.0)]):
        assert torch.is_grad_enabled()
    with torch.inference_mode(), applied(model, [(lora, 1.0)]):
        assert forward(model).isfinite().all()
    assert forward(model).isfinite().all()


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_applied_to_quantised_weights(
    model: InfiniteTalkTransformer3DModel, lora: Lora, quantization: Quantization
) -> None:
    quantize(model, quantization)
    layer, plain = model.get_submodule("blocks.0.attn1.to_q"), forward(model)
    up, down = next(delta.factors for delta in lora.deltas if delta.parameter == "blocks.0.attn1.to_q.weight")
    bias = next(delta.factors[0] for delta in lora.deltas if delta.parameter == "blocks.0.attn1.to_q.bias")
    tokens = torch.randn(3, 128)
    expected = layer(tokens) + 0.9 * (0.5 * tokens @ down.T @ up.T + bias)
    with applied(model, [(lora, 0.9)]):
        torch.testing.assert_close(layer(tokens), expected)
        assert not torch.allclose(forward(model), plain, rtol=0, atol=1e-3)
    assert torch.equal(forward(model), plain)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_applied_to_an_offloaded_model(model: InfiniteTalkTransformer3DModel, lora: Lora, level: str) -> None:
    plain = forward(model)
    with applied(model, [(lora, 0.9)]):
        expected = forward(model)
    apply_group_offloading(model, CPU, CPU, offload_type=level, num_blocks_per_group=1)
    before = weights(model)
    with applied(model, [(lora, 0.9)]):
        assert torch.equal(forward(model), expected)
        assert torch.equal(forward(model), expected)
    assert same(weights(model), before)
    assert torch.equal(forward(model), plain)


def test_applied_to_a_compiled_model(model: InfiniteTalkTransformer3DModel, lora: Lora) -> None:
    with applied(model, [(lora, 0.9)]):
        expected = forward(model)
    model.get_submodule("blocks.2.ffn").compile(backend="eager")
    plain = forward(model)
    with applied(model, [(lora, 0.9)]):
        torch.testing.assert_close(forward(model), expected, rtol=0, atol=5e-5)
    assert torch.equal(forward(model), plain)


def test_the_computation_stays_in_the_type_of_the_model(lora: Lora) -> None:
    model = load(torch.bfloat16)
    kinds = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output: kinds.add(output.dtype), always_call=True)
    plain = forward(model)
    without, kinds = kinds, set()
    with applied(model, [(lora, 0.9)]):
        with_lora = forward(model)
    assert kinds == without == {torch.bfloat16, torch.float32}
    merge(model, lora, 0.9)
    error = (with_lora - forward(model)).abs().mean()
    assert error < 0.1 * (with_lora - plain).abs().mean()


# What is refused.

Q = "diffusion_model.blocks.0.self_attn.q"
PAIR = {f"{Q}.lora_down.weight": torch.ones(RANK, 128), f"{Q}.lora_up.weight": torch.ones(128, RANK)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "is empty"),
        (PAIR | {f"{Q}.dora_scale": torch.ones(128)}, f"has a tensor '{Q}.dora_scale', which is not"),
        (PAIR | {"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, "'text_encoder.x.lora_A.weight', which is not"),
        (
            PAIR | {f"{Q.replace('self_attn.q', 'audio_cross_attn.proj')}.diff": torch.ones(1)},
            "'diffusion_model.blocks.0.audio_cross_attn.proj.diff', which is not",
        ),
        (PAIR | {"transformer_2.blocks.0.attn1.to_q.diff": torch.ones(1)}, "'transformer_2.blocks.0.attn1.to_q.diff'"),
        ({"motion_encoder.enc.net_app.convs.0.diff_b": torch.ones(1)}, "'motion_encoder.enc.net_app.convs.0.diff_b'"),
        ({"blocks.0.norm3.bias": torch.ones(128)}, "has a tensor 'blocks.0.norm3.bias', which is not"),
        ({f"{Q}.lora_up.weight": torch.ones(128, 4)}, f"has '{Q}.lora_up.weight' without its other half"),
        ({f"{Q}.lora_down.weight": torch.ones(4, 128)}, f"has '{Q}.lora_down.weight' without its other half"),
        (PAIR | {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(1.0)}, "has 'diffusion_model.blocks.0.ffn.0.alp"),
        (PAIR | {f"{Q}.lora_up.weight": torch.ones(128, 3)}, f"'{Q}.lora_up.weight' has shape [128, 3] and '{Q}.lora_"),
        (PAIR | {f"{Q}.lora_up.weight": torch.ones(128)}, f"'{Q}.lora_up.weight' has shape [128] and"),
        ({f"{Q}.lora_up.weight": torch.ones(128, 0), f"{Q}.lora_down.weight": torch.ones(0, 128)}, "[128, 0] and"),
        (PAIR | {f"{Q}.alpha": torch.ones(2)}, f"'{Q}.alpha' has shape [2]"),
        (PAIR | {f"{Q}.diff": torch.ones(128, 128, dtype=torch.int8)}, f"'{Q}.diff' is torch.int8"),
        (PAIR | peft(Q, torch.ones(128, RANK), torch.ones(RANK, 128)), f"has both '{Q}.lora_"),
    ],
)
def test_a_file_that_is_no_lora_of_ours(tmp_path: Path, tensors: Tensors, says: str) -> None:
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(CheckpointError) as error:
        read_lora(path)
    assert str(path) in str(error.value) and says in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    pickled, missing, damaged = (tmp_path / name for name in ("a.pt", "b.safetensors", "c.safetensors"))
    torch.save(PAIR, pickled)
    damaged.write_bytes(write(tmp_path / "whole.safetensors", PAIR).read_bytes()[:-1])
    for path, says in ((pickled, "is not a .safetensors file"), (missing, "is missing"), (damaged, "is truncated or")):
        with pytest.raises(CheckpointError, match=f"{path} .*{says}|{path} {says}"):
            read_lora(path)


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing() -> None:
    with tempfile.TemporaryDirectory() as folder:  # below pytest's own folders only their owner sees anything
        path, us = write(Path(folder) / "lora.safetensors", PAIR), os.geteuid()
        Path(folder).chmod(0o755)
        path.chmod(0)
        if us == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match=rf"{path} cannot be read by uid \d+: Permission denied"):
                read_lora(path)
        finally:
            os.seteuid(us)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {"diffusion_model.blocks.39.ffn.0.diff_b": torch.ones(256)},
            "'diffusion_model.blocks.39.ffn.0.diff_b' is for blocks.39.ffn.net.0.proj.bias, which this model lacks",
        ),
        (
            {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(128)},
            "'diffusion_model.blocks.0.self_attn.norm_q.diff_b' is for blocks.0.attn1.norm_q.bias, which this model",
        ),
        (
            {"diffusion_model.patch_embedding.diff": torch.ones(128, 16, 1, 2, 2)},  # of a text-to-video model
            "'diffusion_model.patch_embedding.diff' is for a parameter of shape [128, 16, 1, 2, 2], but "
            "patch_embedding.weight has [128, 36, 1, 2, 2]",
        ),
        (
            {f"{Q}.lora_down.weight": torch.ones(RANK, 64), f"{Q}.lora_up.weight": torch.ones(128, RANK)},
            f"'{Q}.lora_up.weight' is for a parameter of shape [128, 64], but blocks.0.attn1.to_q.weight has [128, 1",
        ),
        ({f"{Q}.diff_b": torch.ones(1)}, f"'{Q}.diff_b' is for a parameter of shape [1], but"),
        ({f"{Q}.diff": torch.tensor(1.0)}, f"'{Q}.diff' is for a parameter of shape [], but"),
    ],
)
def test_a_lora_for_another_model_changes_nothing(
    model: InfiniteTalkTransformer3DModel, tmp_path: Path, tensors: Tensors, says: str
) -> None:
    lora = read_lora(
        write(tmp_path / "lora.safetensors", {"diffusion_model.head.diff_m": torch.ones(1, 2, 128)} | tensors)
    )
    before = weights(model)
    for use in (lambda: merge(model, lora, 1.0), lambda: applied(model, [(lora, 1.0)]).__enter__()):
        with pytest.raises(CheckpointError) as error:
            use()
        assert f"{lora.path}: {says}" in str(error.value)
        assert same(weights(model), before)


# Presets.


@pytest.mark.parametrize("name", FEW_STEPS)
def test_a_preset_is_valid_settings_and_few_passes(name: str) -> None:
    preset = FEW_STEPS[name]
    settings = replace(Settings(), **preset.settings)
    assert settings.steps <= 8 and settings.text_guidance == 1
    assert preset.file.count("/") >= 2 and preset.file.endswith(".safetensors")
