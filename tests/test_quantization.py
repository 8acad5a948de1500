"""Weights of one byte: which they are, how far off, and that the published quantised files say the same to us."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from optimum.quanto import QLinear, freeze, qint8, quantization_map, requantize
from optimum.quanto import quantize as quanto_quantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import Float8Tensor, Int8Tensor

from infinitetalk import checkpoints
from infinitetalk.errors import CheckpointError
from infinitetalk.quantization import Quantization, quantize, quantized
from infinitetalk.transformer import InfiniteTalkBlock, InfiniteTalkTransformer3DModel
from scripts import make_tiny_snapshots

CPU = torch.device("cpu")
WAN = "Wan2.1-I2V-14B-480P"
PUBLISHED = [f"infinitetalk_{people}_{kind}" for people in ("single", "multi") for kind in ("fp8", "int8", "fp8_lora")]
STORAGE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

kinds = pytest.mark.parametrize("kind", get_args(Quantization))


def load(
    snapshots: Path, audio: str = "InfiniteTalk", kind: Quantization | None = None, dtype: torch.dtype = torch.float32
) -> InfiniteTalkTransformer3DModel:
    return checkpoints.load_transformer(snapshots / WAN, snapshots / audio, CPU, dtype, kind)


def relative_error(output: Tensor, expected: Tensor) -> float:
    return ((output.float() - expected.float()).norm() / expected.float().norm()).item()


# Our own, made from wider weights.


@kinds
def test_exactly_the_linear_layers_of_the_blocks_are_kept_in_one_byte_per_weight(
    snapshots: Path, kind: Quantization
) -> None:
    wide, narrow = (dict(load(snapshots, kind=chosen).named_parameters()) for chosen in (None, kind))
    within_a_block = {
        *(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")),
        *(f"audio_cross_attn.single.{layer}" for layer in ("q_linear", "kv_linear", "proj")),
        *(f"audio_cross_attn.multi.{layer}" for layer in ("q_linear", "kv_linear", "proj")),
        "ffn.net.0.proj",
        "ffn.net.2",
    }
    expected = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in within_a_block}
    assert expected == {name for name, tensor in narrow.items() if isinstance(tensor, (Float8Tensor, Int8Tensor))}
    for name, tensor in narrow.items():
        if name in expected:
            assert tensor.qdata.dtype == STORAGE[kind]
            assert tensor.qdata.shape == wide[name].shape
            assert tensor.scale.numel() == len(wide[name])
        else:
            assert torch.equal(tensor, wide[name]), name


@kinds
@torch.no_grad()
def test_the_transformer_is_off_by_a_few_percent(snapshots: Path, kind: Quantization) -> None:
    generator = torch.Generator().manual_seed(0)
    conditions = {
        "hidden_states": torch.randn(1, 36, 2, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 512, 64, generator=generator),
        "encoder_hidden_states_image": torch.randn(1, 257, 64, generator=generator),
        "audio": torch.randn(1, 1, 5, 5, 12, 32, generator=generator),
    }
    time = torch.tensor([500.0])
    exact, narrow = (load(snapshots, kind=chosen)(timestep=time, **conditions) for chosen in (None, kind))
    assert 1e-4 < relative_error(narrow, exact) < {"fp8": 0.05, "int8": 0.02}[kind]


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_wide_block_is_off_by_a_few_percent(kind: Quantization, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = InfiniteTalkBlock(512, 1408, 4, 1e-6, 512, 256, ["single"])
    given = (torch.randn(1, 64, 512), torch.randn(1, 257 + 512, 512), torch.randn(1, 6, 512))
    rotations = torch.polar(torch.ones(64, 1, 64), torch.randn(64, 1, 64))

    def run(block: nn.Module, dtype: torch.dtype) -> Tensor:
        hidden, context, modulation = given
        output: Tensor = block(hidden.to(dtype), context.to(dtype), modulation, rotations)
        return output

    exact = run(block, torch.float32)
    narrow = copy.deepcopy(block).to(dtype)
    quantize(nn.ModuleDict({"blocks": nn.ModuleList([narrow])}), kind)
    assert narrow.get_parameter("ffn.net.2.weight").dtype == dtype  # what it counts as, not what it is stored as
    assert 5e-3 < relative_error(run(narrow, dtype), exact) < {"fp8": 0.05, "int8": 0.02}[kind]


class TestLayer:
    """One linear layer, of 128 inputs and 96 outputs, the fourth of which is dead."""

    @pytest.fixture
    def weight(self) -> Tensor:
        weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) / 128**0.5
        weight[3] = 0
        return weight

    @pytest.fixture
    def given(self) -> Tensor:
        given = torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(1))
        given[0, 7] = 0
        return given

    def layer(self, weight: Tensor, kind: Quantization) -> Any:
        layer: Any = nn.Linear(128, 96, bias=False)
        layer.weight = nn.Parameter(quantized(weight, kind), requires_grad=False)
        return layer

    @kinds
    def test_it_rounds_its_input_too_and_stays_finite_on_zeros(
        self, weight: Tensor, given: Tensor, kind: Quantization
    ) -> None:
        rounded = quantized(given.flatten(0, 1), kind).dequantize().view_as(given)
        assert 1e-3 < relative_error(rounded, given) < 0.03
        layer = self.layer(weight, kind)
        output = layer(given)
        assert relative_error(output, rounded @ layer.weight.dequantize().T) < 1e-3
        assert output[0, 7].tolist() == [0] * 96
        assert output[:, :, 3].unique().tolist() == [0]

    def test_where_the_card_cannot_multiply_in_fp8_only_the_weight_is_rounded(
        self, weight: Tensor, given: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for capability, widened in ((8, 0), True), ((8, 9), False), ((9, 0), False):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
            layer = self.layer(weight, "fp8")
            assert layer.weight.qdata.dtype == torch.float8_e4m3fn
            assert torch.equal(layer(given), given @ layer.weight.dequantize().T) is widened

    @kinds
    def test_the_same_weight_gives_the_same_bytes(self, weight: Tensor, kind: Quantization) -> None:
        one, other = (self.layer(weight.clone(), kind).weight for _ in range(2))
        assert torch.equal(one.qdata.view(torch.uint8), other.qdata.view(torch.uint8))
        assert torch.equal(one.scale, other.scale)

    @kinds
    def test_it_moves_and_saves_like_any_other(
        self, weight: Tensor, given: Tensor, kind: Quantization, tmp_path: Path
    ) -> None:
        layer = self.layer(weight, kind)
        expected = layer(given)
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        moved = copy.deepcopy(layer).to("meta")
        assert {moved.weight.qdata.device.type, moved.weight.scale.device.type} == {"meta"}
        moved.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True), assign=True)
        assert moved.weight.qdata.dtype == STORAGE[kind]
        assert torch.equal(moved(given), expected)

    @kinds
    def test_it_compiles_whole(self, weight: Tensor, given: Tensor, kind: Quantization) -> None:
        layer = self.layer(weight, kind)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(given), layer(given), atol=1e-5)

    @kinds
    def test_it_can_be_offloaded_in_groups(self, weight: Tensor, given: Tensor, kind: Quantization) -> None:
        layers: Any = nn.Sequential(self.layer(weight, kind), nn.GELU())
        expected = layers(given)
        apply_group_offloading(layers, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
        assert torch.equal(layers(given), expected)
        assert layers[0].weight.qdata.dtype == STORAGE[kind]


@kinds
@torch.no_grad()
def test_of_the_text_encoder_too_the_blocks_are_quantised(snapshots: Path, kind: Quantization) -> None:
    wide, narrow = (
        checkpoints.load_text_encoder(snapshots / WAN, CPU, torch.float32, chosen) for chosen in (None, kind)
    )
    count = sum(isinstance(tensor, (Float8Tensor, Int8Tensor)) for tensor in narrow.parameters())
    assert count == 2 * 7  # query, key, value, output; gate, up, down
    tokens = torch.arange(3, 40)[None]
    exact, near = (encoder(tokens).last_hidden_state for encoder in (wide, narrow))
    assert 1e-4 < relative_error(near, exact) < {"fp8": 0.2, "int8": 0.05}[kind]


# The published ones, of optimum-quanto.


@pytest.fixture
def published(snapshots: Path, tmp_path: Path) -> Path:
    """The snapshots with nothing of the transformer's but its config, and quantised files to damage."""
    shutil.copytree(snapshots / "InfiniteTalk" / "quant_models", tmp_path / "quant_models")
    (tmp_path / WAN).mkdir()
    shutil.copy(snapshots / WAN / "config.json", tmp_path / WAN)
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_whole_quantised_model_is_read_as_quanto_reads_it_and_without_the_base(published: Path, name: str) -> None:
    file = published / "quant_models" / f"{name}.safetensors"
    people = name.split("_")[1]
    unquantised = make_tiny_snapshots.base_transformer(0) | make_tiny_snapshots.audio_branch(0, people)
    quanto = make_tiny_snapshots.module_tree({key: torch.zeros_like(tensor) for key, tensor in unquantised.items()})
    requantize(quanto, load_file(file), json.loads(file.with_suffix(".json").read_text()))
    expected = [parameter.dequantize().detach() for parameter in quanto.parameters()]

    loaded = dict(load(published, f"quant_models/{name}.safetensors").named_parameters())
    assert len(loaded) == len(expected) == len(unquantised)
    by_bytes = {(tuple(tensor.shape), tensor.numpy().tobytes()) for tensor in expected}
    assert {(tuple(tensor.shape), tensor.numpy().tobytes()) for tensor in loaded.values()} == by_bytes
    layer: Any = quanto.get_submodule("blocks.1.audio_cross_attn.kv_linear")
    assert torch.equal(loaded["blocks.1.audio_cross_attn.single.kv_linear.weight"], layer.weight.dequantize())


def test_quantised_again_it_is_what_it_was(published: Path) -> None:
    name = "infinitetalk_single_fp8"
    stored = load_file(published / "quant_models" / f"{name}.safetensors")
    again = load(published, f"quant_models/{name}.safetensors", "fp8").get_parameter("blocks.1.ffn.net.2.weight")
    assert torch.equal(again.qdata.float(), stored["blocks.1.ffn.2.weight._data"].float())
    assert torch.allclose(again.scale, stored["blocks.1.ffn.2.weight._scale"], rtol=1e-6, atol=0)


def test_bfloat16_scales_give_quantos_bfloat16(published: Path) -> None:
    """The published files were made from a bfloat16 model, so their scales are bfloat16."""
    whole = make_tiny_snapshots.base_transformer(0) | make_tiny_snapshots.audio_branch(0, "single")
    model = make_tiny_snapshots.module_tree({key: tensor.bfloat16() for key, tensor in whole.items()})
    quanto_quantize(model, weights=qint8)
    freeze(model)
    save_file(model.state_dict(), published / "half.safetensors")
    (published / "half.json").write_text(json.dumps(quantization_map(model)))
    loaded = load(published, "half.safetensors", dtype=torch.bfloat16)
    layer = model.get_submodule("blocks.0.self_attn.q")
    assert isinstance(layer, QLinear)
    assert torch.equal(loaded.get_parameter("blocks.0.attn1.to_q.weight"), layer.weight.dequantize())


def test_the_newer_name_of_the_same_type_is_read(published: Path) -> None:
    quant_map = published / "quant_models" / "infinitetalk_single_fp8.json"
    quant_map.write_text(quant_map.read_text().replace('"qfloat8"', '"qfloat8_e4m3fn"'))
    load(published, "quant_models/infinitetalk_single_fp8.safetensors")


LAYER = "blocks.1.ffn.0"
Damage = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda tensors, _: tensors.pop(f"{LAYER}.weight._scale"), f"{LAYER}.weight._scale"),
        (lambda tensors, _: tensors.pop(f"{LAYER}.weight._data"), f"{LAYER}.weight._data"),
        (lambda tensors, _: tensors.pop(f"{LAYER}.bias"), "lacks 1 of"),
        (lambda tensors, _: tensors.update({f"{LAYER}.weight._scale": torch.ones(())}), "expected [128, 1]"),
        (lambda tensors, _: tensors.update({f"{LAYER}.weight._data": torch.ones(128, 64)}), "torch.float32"),
        (lambda tensors, _: tensors.update({f"{LAYER}.weight._shift": torch.ones(128, 1)}), f"{LAYER}.weight._shift"),
        (lambda _, modules: modules.pop(LAYER), f"{LAYER}.weight"),
        (lambda _, modules: modules.update({"blocks.1.extra": modules[LAYER]}), "blocks.1.extra.weight"),
        (lambda _, modules: modules[LAYER].update(weights="qint4"), "qint4"),
        (lambda _, modules: modules[LAYER].update(activations="qint8"), "activations"),
        (lambda _, modules: modules.update({LAYER: "qfloat8"}), LAYER),
    ],
)
def test_another_format_is_refused_by_its_name(published: Path, damage: Damage, named: str) -> None:
    file = published / "quant_models" / "infinitetalk_single_fp8.safetensors"
    tensors, modules = load_file(file), json.loads(file.with_suffix(".json").read_text())
    damage(tensors, modules)
    save_file(tensors, file)
    file.with_suffix(".json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError) as error:
        load(published, "quant_models/infinitetalk_single_fp8.safetensors")
    assert named in str(error.value)
    assert str(file) in str(error.value)


def test_a_quantised_file_without_its_map_names_the_map(published: Path) -> None:
    quant_map = published / "quant_models" / "infinitetalk_single_fp8.json"
    quant_map.unlink()
    with pytest.raises(CheckpointError) as error:
        load(published, "quant_models/infinitetalk_single_fp8.safetensors")
    assert str(quant_map) in str(error.value)


@pytest.mark.parametrize("place", ["InfiniteTalk/whole.safetensors", f"{WAN}/{checkpoints.TRANSFORMER_FILE}"])
def test_a_whole_model_that_is_not_quantised_is_refused_in_either_place(
    snapshots: Path, tmp_path: Path, place: str
) -> None:
    for folder in (WAN, "InfiniteTalk"):
        shutil.copytree(snapshots / folder, tmp_path / folder)
    whole = make_tiny_snapshots.base_transformer(0) | make_tiny_snapshots.audio_branch(0, "single")
    save_file(whole, tmp_path / place)
    with pytest.raises(CheckpointError, match="which this model does not know") as error:
        load(tmp_path, place if place.startswith("InfiniteTalk") else "InfiniteTalk")
    assert str(tmp_path / place) in str(error.value)
