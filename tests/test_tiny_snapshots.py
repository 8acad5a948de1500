"""The tiny snapshots: file for file and key for key what the three Hugging Face repositories hold, only smaller."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_tiny_snapshots.py"
NAMES = ["Wan2.1-I2V-14B-480P", "chinese-wav2vec2-base", "InfiniteTalk"]
PEOPLE = ["single", "multi"]
BITS = ["fp8", "int8"]
LAYERS = 2  # of the tiny transformer and of the tiny T5


def start(directory: Path, *arguments: str, python_path: Path | None = None) -> subprocess.Popen[str]:
    """The script as a user runs it, still running."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(python_path)} if python_path else {})
    command = [sys.executable, str(SCRIPT), str(directory), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Three runs, side by side: name → the folder written and what was printed."""
    root = tmp_path_factory.mktemp("snapshots")
    bare = root / "bare"  # on the path, an `optimum` without quanto: as if optimum-quanto were not installed
    (bare / "optimum").mkdir(parents=True)
    (bare / "optimum" / "__init__.py").touch()
    processes = {
        "first": start(root / "first"),
        "again": start(root / "again", "--seed", "0"),
        "seed 1, no quanto": start(root / "other", "--seed", "1", python_path=bare),
    }
    results = {}
    for name, process in processes.items():
        printed, error = process.communicate()
        assert process.returncode == 0, error
        results[name] = (Path(str(process.args[2])), printed)  # type: ignore[index]
    return results


@pytest.fixture(scope="module")
def snapshots(runs: dict[str, tuple[Path, str]]) -> Path:
    return runs["first"][0]


@pytest.fixture(scope="module")
def wan(snapshots: Path) -> Path:
    return snapshots / "Wan2.1-I2V-14B-480P"


@pytest.fixture(scope="module")
def infinitetalk(snapshots: Path) -> Path:
    return snapshots / "InfiniteTalk"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def load_pth(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return tensors


def load_transformer(wan: Path) -> dict[str, Tensor]:
    shards = sorted(wan.glob("diffusion_pytorch_model-*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def dtypes(tensors: dict[str, Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors.values()}


# Writing


def test_prints_where_each_snapshot_is_and_how_big(runs: dict[str, tuple[Path, str]]) -> None:
    directory, printed = runs["first"]
    lines = [line for line in printed.splitlines() if line.endswith(" MB")]
    assert [line.split()[0] for line in lines] == [str(directory / name) for name in NAMES]
    assert sum(float(line.split()[1]) for line in lines) < 25


def test_the_same_seed_gives_the_same_bytes(runs: dict[str, tuple[Path, str]]) -> None:
    assert contents(runs["first"][0]) == contents(runs["again"][0])


def test_another_seed_gives_other_weights_in_the_same_layout(runs: dict[str, tuple[Path, str]]) -> None:
    first, other = contents(runs["first"][0]), contents(runs["seed 1, no quanto"][0])
    weights = {name for name in other if name.endswith((".safetensors", ".pth", ".bin", ".pt"))}
    assert {name for name in other if first[name] != other[name]} == weights | {f"{name}/README.md" for name in NAMES}


def test_without_optimum_quanto_only_the_quantised_models_are_missing(runs: dict[str, tuple[Path, str]]) -> None:
    directory, printed = runs["seed 1, no quanto"]
    assert "quant_models is left out" in printed
    assert contents(directory).keys() == {name for name in contents(runs["first"][0]) if "quant_models" not in name}


def test_a_snapshot_that_is_already_there_is_left_alone(tmp_path: Path) -> None:
    existing = tmp_path / "InfiniteTalk" / "weights"
    existing.parent.mkdir()
    existing.write_text("precious")
    process = start(tmp_path)
    assert str(existing.parent) in process.communicate()[1]
    assert process.returncode == 2
    assert contents(tmp_path) == {"InfiniteTalk/weights": b"precious"}


# Wan2.1-I2V-14B-480P


def test_wan_has_the_published_files(wan: Path) -> None:
    tokenizer = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    assert contents(wan).keys() == {
        "README.md",
        "config.json",
        *(f"diffusion_pytorch_model-0000{i}-of-00007.safetensors" for i in range(1, 8)),
        "diffusion_pytorch_model.safetensors.index.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "Wan2.1_VAE.pth",
        *(f"google/umt5-xxl/{name}" for name in tokenizer),
        *(f"xlm-roberta-large/{name}" for name in tokenizer),
    }


def test_the_config_has_the_published_fields_and_no_others(wan: Path) -> None:
    fields = "dim eps ffn_dim freq_dim in_dim model_type num_heads num_layers out_dim text_len"
    assert read_json(wan / "config.json").keys() == {"_class_name", "_diffusers_version", *fields.split()}


def test_the_index_says_where_each_key_is(wan: Path) -> None:
    index = read_json(wan / "diffusion_pytorch_model.safetensors.index.json")
    found = {name: path.name for path in wan.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == found
    assert len(set(found.values())) == 7
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in load_transformer(wan).values())}


def test_the_transformer_is_wan_image_to_video_in_float32(wan: Path) -> None:
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    tensors = load_transformer(wan)
    assert len(tensors) == 23 + 32 * LAYERS  # 1303 in the published one, of 40 layers
    assert dtypes(tensors) == {torch.float32}
    model: Any = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=36,
        text_dim=64,
        ffn_dim=128,
        num_layers=LAYERS,
        image_dim=64,
        added_kv_proj_dim=64,
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(tensors)), strict=True)


def test_the_text_encoder_is_umt5_in_bfloat16(wan: Path) -> None:
    tensors = load_pth(wan / "models_t5_umt5-xxl-enc-bf16.pth")
    layer = [f"attn.{projection}" for projection in "qkvo"] + ["ffn.gate.0", "ffn.fc1", "ffn.fc2"]
    layer += ["norm1", "norm2", "pos_embedding.embedding"]
    layers = {f"blocks.{i}.{name}.weight" for i in range(LAYERS) for name in layer}
    assert tensors.keys() == {"token_embedding.weight", "norm.weight"} | layers
    assert dtypes(tensors) == {torch.bfloat16}


def test_the_image_encoder_is_a_whole_open_clip_in_float16(wan: Path) -> None:
    tensors = load_pth(wan / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    affine = ["norm1", "norm2", "attn.to_qkv", "attn.proj", "mlp.0", "mlp.2"]
    modules = ["pre_norm", "post_norm", *(f"transformer.{i}.{name}" for i in range(4) for name in affine)]
    visual = {f"visual.{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    visual |= {f"visual.{name}" for name in ("cls_embedding", "pos_embedding", "head", "patch_embedding.weight")}
    assert {name for name in tensors if not name.startswith("textual.")} == visual | {"log_scale"}
    assert {name.split(".")[1] for name in tensors if name.startswith("textual.")} == {
        *("token_embedding", "type_embedding", "pos_embedding", "blocks", "norm", "head")
    }
    assert tensors["visual.pos_embedding"].shape == (1, 1 + (224 // 14) ** 2, 64)
    assert dtypes(tensors) == {torch.float16}


def test_the_autoencoder_is_wan_and_turns_random_latents_into_many_colours(wan: Path) -> None:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    tensors = load_pth(wan / "Wan2.1_VAE.pth")
    assert len(tensors) == 194  # as published
    assert dtypes(tensors) == {torch.float32}
    vae: Any = AutoencoderKLWan(base_dim=4)
    vae.load_state_dict(convert_wan_vae_to_diffusers(tensors), strict=True)
    latents = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        video = vae.decode(latents).sample  # [1, 3, 5, 64, 64]
    assert (video.std(dim=(0, 2, 3, 4)) > 0.2).all()
    assert (video.abs() >= 1).float().mean() < 0.2


@pytest.mark.parametrize("folder", ["google/umt5-xxl", "xlm-roberta-large"])
def test_the_tokenizers_take_any_text_and_pad_to_512(wan: Path, folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(wan / folder)
    prompts = ["A woman speaks.", "Grüße\n你好 🙂", "long " * 200]
    batch = tokenizer(prompts, padding="max_length", truncation=True, max_length=512, return_tensors="pt")
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, 512)
    assert batch.attention_mask.sum(dim=1).tolist() == [len(prompts[0]) + 1, len(prompts[1]) + 1, 512]
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True).replace(" ", "") == "Awomanspeaks."
    ends = batch.attention_mask.sum(dim=1) - 1
    assert (batch.input_ids[range(3), ends] == tokenizer.eos_token_id).all()
    assert (batch.input_ids[1] == tokenizer.unk_token_id).sum() == len("üß\n你好🙂")
    vocabulary = load_pth(wan / "models_t5_umt5-xxl-enc-bf16.pth")["token_embedding.weight"].shape[0]
    assert len(tokenizer) <= vocabulary


# chinese-wav2vec2-base


def test_wav2vec2_has_the_published_files(snapshots: Path) -> None:
    assert contents(snapshots / "chinese-wav2vec2-base").keys() == {
        *("README.md", "config.json", "preprocessor_config.json", "pytorch_model.bin"),
        "chinese-wav2vec2-base-fairseq-ckpt.pt",
    }


def test_wav2vec2_was_saved_for_pre_training_by_an_old_torch(snapshots: Path) -> None:
    from transformers import Wav2Vec2Model

    folder = snapshots / "chinese-wav2vec2-base"
    tensors = load_pth(folder / "pytorch_model.bin")
    position = "wav2vec2.encoder.pos_conv_embed.conv"
    assert {f"{position}.weight_g", f"{position}.weight_v", "wav2vec2.masked_spec_embed"} <= tensors.keys()

    loaded: Any = Wav2Vec2Model.from_pretrained(folder, output_loading_info=True)
    _, loading = loaded
    assert not loading["missing_keys"] | loading["mismatched_keys"]
    heads = {name for name in tensors if not name.startswith("wav2vec2.")}
    assert set(loading["unexpected_keys"]) == heads
    assert {name.split(".")[0] for name in heads} == {"quantizer", "project_q", "project_hid"}


# InfiniteTalk


def test_infinitetalk_has_the_published_files(infinitetalk: Path) -> None:
    assert {name for name in contents(infinitetalk) if not name.startswith("quant_models/")} == {
        "README.md",
        *(f"{people}/infinitetalk.safetensors" for people in PEOPLE),
        *(f"comfyui/infinitetalk_{people}.safetensors" for people in PEOPLE),
    }


def test_the_audio_branch_is_only_the_added_keys(infinitetalk: Path) -> None:
    affine = [f"audio_proj.{name}" for name in ("proj1", "proj1_vf", "proj2", "proj3", "norm")]
    for i in range(LAYERS):
        affine += [f"blocks.{i}.norm_x"]
        affine += [f"blocks.{i}.audio_cross_attn.{name}" for name in ("q_linear", "kv_linear", "proj")]
    tensors = load_file(infinitetalk / "single" / "infinitetalk.safetensors")
    assert tensors.keys() == {f"{module}.{leaf}" for module in affine for leaf in ("weight", "bias")}
    assert dtypes(tensors) == {torch.float32}
    assert tensors["audio_proj.proj1.weight"].shape == (64, 5 * 12 * 32)  # window x layers x channels
    assert tensors["audio_proj.proj1_vf.weight"].shape == (64, 8 * 12 * 32)  # eight slots in a latent frame
    assert tensors["audio_proj.proj3.weight"].shape == (32 * 48, 64)  # tokens x width


def test_one_person_and_two_have_their_own_weights(infinitetalk: Path) -> None:
    single, multi = (load_file(infinitetalk / people / "infinitetalk.safetensors") for people in PEOPLE)
    assert single.keys() == multi.keys()
    assert not any(torch.equal(single[name], multi[name]) for name in single)


def test_the_quantised_models_have_the_published_files(infinitetalk: Path) -> None:
    pytest.importorskip("optimum.quanto")
    whole = [f"infinitetalk_{people}_{bits}{lora}" for people in PEOPLE for bits in BITS for lora in ("", "_lora")]
    assert contents(infinitetalk / "quant_models").keys() == {
        *(f"{name}.{ending}" for name in whole for ending in ("safetensors", "json")),
        *(f"t5_{bits}.safetensors" for bits in BITS),
        *(f"t5_map_{bits}.json" for bits in BITS),
        "quant.json",
    }


def linear_layers(modules: dict[str, dict[str, str]], tensors: dict[str, Tensor]) -> nn.Module:
    """Float linear layers under the names and in the shapes of the quantised ones, nested as the names say."""
    root = nn.Module()
    for path in modules:
        parent, (*names, last) = root, path.split(".")
        for name in names:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        outputs, inputs = tensors[f"{path}.weight._data"].shape
        parent.add_module(last, nn.Linear(inputs, outputs, bias=f"{path}.bias" in tensors))
    return root


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("model", ["single", "multi", "t5"])
def test_a_quantised_model_is_a_whole_one_in_the_format_of_optimum_quanto(
    wan: Path, infinitetalk: Path, model: str, bits: str
) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    folder = infinitetalk / "quant_models"
    if model == "t5":
        whole = load_pth(wan / "models_t5_umt5-xxl-enc-bf16.pth")
        tensors, modules = load_file(folder / f"t5_{bits}.safetensors"), read_json(folder / f"t5_map_{bits}.json")
    else:
        whole = load_transformer(wan) | load_file(infinitetalk / model / "infinitetalk.safetensors")
        path = folder / f"infinitetalk_{model}_{bits}.safetensors"
        tensors, modules = load_file(path), read_json(path.with_suffix(".json"))

    # The map names every linear layer; each has data and scales in place of its weight; the rest is as it was.
    linear = {name for name, tensor in whole.items() if tensor.ndim == 2 and "embedding.weight" not in name}
    assert {f"{module}.weight" for module in modules} == linear
    weights = {"fp8": "qfloat8", "int8": "qint8"}[bits]
    assert all(entry == {"weights": weights, "activations": "none"} for entry in modules.values())
    added = ("weight._data", "weight._scale", "input_scale", "output_scale")
    assert tensors.keys() == whole.keys() - linear | {f"{module}.{leaf}" for module in modules for leaf in added}
    assert all(torch.equal(tensors[name], whole[name]) for name in whole.keys() - linear)

    # quanto reads it back, and within its rounding the weights are those of the model.
    tree = linear_layers(modules, tensors)
    quanto.requantize(tree, tensors, modules)
    for module in modules:
        layer: Any = tree.get_submodule(module)
        original = whole[f"{module}.weight"]
        error = (layer.weight.dequantize().float() - original.float()).abs()
        size = original.float().abs()
        largest = size.amax(dim=1, keepdim=True)  # there is one scale per row
        # int8: half a step of 127; e4m3: half a unit of its 3 bits, below 2^-6 of its 448 half a step of 2^-9.
        rounding = largest / 127 / 2 if bits == "int8" else size / 16 + largest / 448 / 2**10
        assert (error <= rounding + 2 * torch.finfo(original.dtype).eps * size).all(), module


@pytest.mark.parametrize("bits", BITS)
def test_the_lora_models_have_other_base_weights_and_the_same_audio_branch(infinitetalk: Path, bits: str) -> None:
    pytest.importorskip("optimum.quanto")
    folder = infinitetalk / "quant_models"
    plain = load_file(folder / f"infinitetalk_single_{bits}.safetensors")
    merged = load_file(folder / f"infinitetalk_single_{bits}_lora.safetensors")
    assert plain.keys() == merged.keys()
    changed = {name for name in plain if not torch.equal(plain[name].float(), merged[name].float())}
    assert {name for name in plain if name.endswith("._data") and "audio" not in name} <= changed
    assert not any("audio" in name for name in changed)


# Everything


def test_no_weight_is_infinite_or_not_a_number_in_any_precision(snapshots: Path) -> None:
    for path in snapshots.rglob("*"):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif path.suffix in (".pth", ".bin"):
            tensors = load_pth(path)
        else:
            continue
        assert all(tensor.half().isfinite().all() for tensor in tensors.values()), path
