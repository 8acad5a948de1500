"""A damaged or wrong model file is refused with its name, the tensor's name and what was expected."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infinitetalk import checkpoints
from infinitetalk.errors import CheckpointError
from infinitetalk.pipeline import InfiniteTalkPipeline

WAN = "Wan2.1-I2V-14B-480P"
SHARD = f"{WAN}/diffusion_pytorch_model-00003-of-00007.safetensors"
INDEX = f"{WAN}/diffusion_pytorch_model.safetensors.index.json"
T5 = f"{WAN}/models_t5_umt5-xxl-enc-bf16.pth"
CLIP = f"{WAN}/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
VAE = f"{WAN}/Wan2.1_VAE.pth"
AUDIO = "InfiniteTalk/single/infinitetalk.safetensors"
SPEECH = "chinese-wav2vec2-base/pytorch_model.bin"
EVERY_FILE = [SHARD, INDEX, T5, CLIP, VAE, AUDIO, SPEECH, f"{WAN}/config.json", "chinese-wav2vec2-base/config.json"]


@pytest.fixture
def models(snapshots: Path, tmp_path: Path) -> Path:
    """A copy to damage; hard links, so damage by replacing files only."""
    return Path(shutil.copytree(snapshots, tmp_path / "models", copy_function=lambda a, b: Path(b).hardlink_to(a)))


def load(models: Path) -> InfiniteTalkPipeline:
    return InfiniteTalkPipeline.from_snapshots(
        models / WAN, models / "InfiniteTalk", models / "chinese-wav2vec2-base", "cpu"
    )


def refusal(models: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(models)
    return str(error.value)


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a .safetensors or torch file."""
    stored = file.suffix == ".safetensors"
    tensors = load_file(file) if stored else torch.load(file, weights_only=True)
    change(tensors)
    file.unlink()
    if stored:
        save_file(tensors, file)
    else:
        torch.save(tensors, file)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_missing_file_is_named(models: Path, name: str) -> None:
    (models / name).unlink()
    message = refusal(models)
    assert str(models / name) in message
    assert "missing" in message


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_file_cut_off_anywhere_is_named(models: Path, name: str, part: float) -> None:
    content = (models / name).read_bytes()
    replace(models / name, content[: int(len(content) * part)])
    assert str(models / name) in refusal(models)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (SHARD, None),  # any key of the third shard
        (T5, "blocks.1.attn.k.weight"),
        (CLIP, "visual.transformer.2.mlp.0.weight"),
        (VAE, "decoder.head.2.bias"),
        (AUDIO, "blocks.1.norm_x.weight"),
        (SPEECH, "wav2vec2.encoder.layers.3.attention.k_proj.bias"),
    ],
)
class TestTensors:
    def test_a_misnamed_tensor_is_named(self, models: Path, name: str, key: str | None) -> None:
        def misname(tensors: dict[str, torch.Tensor]) -> None:
            old = key or next(iter(tensors))
            tensors[old + "x"] = tensors.pop(old)

        edit(models / name, misname)
        message = refusal(models)
        assert str(models / name) in message
        assert (key or "no tensor") in message

    def test_a_missing_tensor_is_named(self, models: Path, name: str, key: str | None) -> None:
        edit(models / name, lambda tensors: tensors.pop(key or next(iter(tensors))))
        message = refusal(models)
        assert str(models / name) in message
        assert "lacks 1 of" in message or "has no tensor" in message

    def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(
        self, models: Path, name: str, key: str | None
    ) -> None:
        changed: list[str] = []

        def grow(tensors: dict[str, torch.Tensor]) -> None:
            changed.append(key or next(iter(tensors)))
            tensors[changed[0]] = torch.cat([tensors[changed[0]]] * 2).contiguous()

        edit(models / name, grow)
        message = refusal(models)
        assert str(models / name) in message
        assert changed[0] in message
        assert "expected [" in message


def test_a_tensor_the_model_does_not_know_is_named(models: Path) -> None:
    edit(models / VAE, lambda tensors: tensors.update({"encoder.extra.weight": torch.zeros(3)}))
    assert "'encoder.extra.weight'" in refusal(models)


def test_a_file_that_would_run_code_is_not_loaded(models: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "exploded",)

    for name in (T5, CLIP, VAE, SPEECH):
        healthy = (models / name).read_bytes()
        (models / name).unlink()
        torch.save({"weight": Bomb()}, models / name)
        assert "could run code" in refusal(models)
        replace(models / name, pickle.dumps(Bomb()))
        assert "could run code" in refusal(models)
        replace(models / name, healthy)
    assert not (tmp_path / "exploded").exists()
    load(models)


def test_a_config_without_an_entry_names_it(models: Path) -> None:
    file = models / WAN / "config.json"
    config = json.loads(file.read_text())
    del config["num_heads"]
    replace(file, json.dumps(config).encode())
    message = refusal(models)
    assert "'num_heads'" in message
    assert str(file) in message


def test_a_folder_that_is_not_a_snapshot_is_named(models: Path) -> None:
    shutil.rmtree(models / WAN / "google")
    assert "umt5-xxl" in refusal(models)


def test_the_published_image_encoder_has_16_heads_of_80() -> None:
    assert checkpoints.clip_heads(1280) == 16


def test_audio_weights_may_be_one_file(snapshots: Path) -> None:
    pipeline = InfiniteTalkPipeline.from_snapshots(
        snapshots / WAN, snapshots / AUDIO, snapshots / "chinese-wav2vec2-base", "cpu"
    )
    published = load_file(snapshots / AUDIO)["blocks.0.norm_x.weight"]
    assert torch.equal(pipeline.transformer.get_parameter("blocks.0.norm_x.single.weight"), published)
