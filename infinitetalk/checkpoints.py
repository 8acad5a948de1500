"""The published files → library modules on a device.

Reads three snapshots exactly as they lie on the hub: Wan2.1-I2V (transformer shards, T5, CLIP, VAE), InfiniteTalk (the
audio branch) and chinese-wav2vec2. Files are memory-mapped; each tensor is read, cast and placed once, so that loading
needs little more memory than the loaded model. Sizes come from the files, nothing is unpickled but tensors.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from infinitetalk.errors import CheckpointError, require
from infinitetalk.lora import Lora, merger
from infinitetalk.quantization import DequantizedTensors, Quantization, StoredTensors, quantizer
from infinitetalk.timeline import AUDIO_WINDOW
from infinitetalk.transformer import InfiniteTalkTransformer3DModel

TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
TRANSFORMER_INDEX = "diffusion_pytorch_model.safetensors.index.json"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
T5_TOKENIZER = "google/umt5-xxl"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
VAE_FILE = "Wan2.1_VAE.pth"
AUDIO_BRANCH_FILES = {"single": "single/infinitetalk.safetensors", "multi": "multi/infinitetalk.safetensors"}
WAV2VEC2_FILES = ("model.safetensors", "pytorch_model.bin")

AUDIO_PARTS = ("audio_proj.", "norm_x.", "audio_cross_attn.")
"""Parameters of the transformer that come from InfiniteTalk; the others come from Wan2.1."""

FLOAT32_PARTS = ("time_embedder", "time_proj.", "scale_shift_table", "norm2.", "norm_x.", "proj_out.")
"""Parameters of the transformer that stay float32 when the rest is bfloat16: time, modulation, affine norms, head."""

_REMAP_BYTES = 256 * 2**20
"""Pages of a mapped file count as this process's memory once read; mapping anew after this much lets them go."""

_REMEDY = "import the snapshot again, or name its folder"

Rename = Callable[[str], str | None]


def load_transformer(
    wan: Path,
    audio: Path,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    loras: Sequence[tuple[Lora, float]] = (),
) -> InfiniteTalkTransformer3DModel:
    """wan: the Wan2.1-I2V snapshot; audio: the InfiniteTalk snapshot, or one file of added tensors.

    Of the snapshot, the branch for one speaker ("single") and the one for two ("multi") are loaded; one file is the
    only branch ("single"), which then serves two speakers as well. A file of `quant_models` holds the base too; of the
    Wan2.1 snapshot only the config is read then. It is dequantised, unless `quantization` says what to make of any
    weights that are read. loras: what is merged into the base, each at its scale.
    """
    config = _read_json(wan / "config.json")
    files = {"single": audio} if audio.is_file() else {name: audio / file for name, file in AUDIO_BRANCH_FILES.items()}
    branches = {name: _plain(file) for name, file in files.items()}
    added = branches["single"]
    whole = wan / TRANSFORMER_FILE
    base: StoredTensors
    if isinstance(added, DequantizedTensors):
        base = added
    else:
        base = _Tensors([whole]) if whole.is_file() else _Tensors.sharded(wan / TRANSFORMER_INDEX)
    audio_width = added.shape("audio_proj.norm.weight")[0]
    audio_hidden, window_features = added.shape("audio_proj.proj1.weight")

    def number(key: str) -> Any:
        return _entry(config, key, wan / "config.json")

    with init_empty_weights(include_buffers=False):
        model = InfiniteTalkTransformer3DModel(
            num_attention_heads=number("num_heads"),
            attention_head_dim=number("dim") // number("num_heads"),
            in_channels=number("in_dim"),
            out_channels=number("out_dim"),
            text_dim=base.shape("text_embedding.0.weight")[1],
            freq_dim=number("freq_dim"),
            ffn_dim=number("ffn_dim"),
            num_layers=number("num_layers"),
            image_dim=base.shape("img_emb.proj.0.weight")[0],
            audio_features=window_features // AUDIO_WINDOW,
            audio_hidden=audio_hidden,
            audio_tokens=added.shape("audio_proj.proj3.weight")[0] // audio_width,
            audio_width=audio_width,
            audio_window=AUDIO_WINDOW,
            audio_branches=tuple(branches),
            eps=number("eps"),
        )
    # The library renames the base keys. The added ones have our names already, and its rules would garble them.
    base_names = {name: name for name in base.names() if not _is_audio(name)}
    renamed = {source: target for target, source in convert_wan_transformer_to_diffusers(base_names).items()}

    def library_name(branch: str, name: str) -> str:
        return _branch_name(branch, name) if _is_audio(name) else renamed.get(name, name)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if any(part in name for part in FLOAT32_PARTS) else dtype

    merge = merger(model, loras)
    quantize = quantizer(model, quantization)

    def finish(name: str, tensor: Tensor) -> Tensor:
        return quantize(name, merge(name, tensor))

    parameters = {name for name, _ in model.named_parameters()}
    heard = set(filter(_is_audio, parameters))
    if base is not added:
        _fill(model, base, lambda name: renamed.get(name, name), device, dtype_of, parameters - heard, finish=finish)
    for branch, tensors in branches.items():
        within = parameters if base is added else {name for name in heard if f".{branch}." in name}
        _fill(model, tensors, partial(library_name, branch), device, dtype_of, within, finish=finish)
    return model.to(device).eval()


def load_vae(wan: Path, device: torch.device) -> AutoencoderKLWan:
    """The video autoencoder, in float32."""
    tensors = _Tensors([wan / VAE_FILE])
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLWan(base_dim=tensors.shape("encoder.conv1.weight")[0])
    renamed = {source: target for target, source in convert_wan_vae_to_diffusers(tensors.names()).items()}
    _fill(vae, tensors, renamed.get, device, lambda _: torch.float32)
    return vae.to(device).eval()


def load_text_encoder(
    wan: Path, device: torch.device, dtype: torch.dtype, quantization: Quantization | None = None
) -> UMT5EncoderModel:
    """umT5-xxl, the prompt's encoder."""
    tensors = _Tensors([wan / T5_FILE])
    vocabulary, width = tensors.shape("token_embedding.weight")
    buckets, heads = tensors.shape("blocks.0.pos_embedding.embedding.weight")
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=tensors.shape("blocks.0.attn.q.weight")[0] // heads,
        d_ff=tensors.shape("blocks.0.ffn.fc1.weight")[0],
        num_layers=_count_blocks(tensors, "blocks."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with init_empty_weights(include_buffers=False):
        encoder = UMT5EncoderModel(config)
    encoder.encoder.embed_tokens = encoder.shared
    _fill(encoder, tensors, _t5_name, device, lambda _: dtype, finish=quantizer(encoder, quantization))
    return encoder.to(device).eval()


def load_tokenizer(wan: Path) -> PreTrainedTokenizerBase:
    folder = wan / T5_TOKENIZER
    require(folder / "tokenizer_config.json", _REMEDY)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no tokenizer that can be read: {error}") from error
    return tokenizer


def load_image_encoder(wan: Path, device: torch.device, dtype: torch.dtype) -> CLIPVisionModel:
    """The visual half of open-clip's ViT-H/14; its text half stays on the disk."""
    tensors = _Tensors([wan / CLIP_FILE])
    width, _, patch, _ = tensors.shape("visual.patch_embedding.weight")
    tokens = tensors.shape("visual.pos_embedding")[1]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors.shape("visual.transformer.0.mlp.0.weight")[0],
        num_hidden_layers=_count_blocks(tensors, "visual.transformer."),
        num_attention_heads=clip_heads(width),
        image_size=patch * round((tokens - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    with init_empty_weights(include_buffers=False):
        encoder = CLIPVisionModel(config)
    _fill(encoder, tensors, _clip_name, device, lambda _: dtype, convert=_clip_tensors)
    return encoder.to(device).eval()


def clip_heads(width: int) -> int:
    """CLIP's attention heads, which its file does not tell: 16 in open-clip's ViT-L to bigG, none under 16 wide."""
    return min(16, width // 16)


def load_speech_encoder(folder: Path, device: torch.device) -> Wav2Vec2Model:
    """chinese-wav2vec2, in float32. The published file also holds heads that only its training used."""
    config = Wav2Vec2Config.from_dict(_read_json(folder / "config.json") | {"mask_time_prob": 0.0})
    present = [folder / name for name in WAV2VEC2_FILES if (folder / name).is_file()]
    tensors = _Tensors(present[:1] or [folder / WAV2VEC2_FILES[-1]])
    with init_empty_weights(include_buffers=False):
        encoder = Wav2Vec2Model(config)
    _fill(encoder, tensors, _wav2vec2_name, device, lambda _: torch.float32)
    return encoder.to(device).eval()


# Published names → library names; None for a tensor that is not needed.


def _is_audio(name: str) -> bool:
    return any(part in name for part in AUDIO_PARTS)


def _branch_name(branch: str, name: str) -> str:
    for part in AUDIO_PARTS:
        name = name.replace(part, f"{part}{branch}.")
    return name


def _t5_name(name: str) -> str | None:
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    for published, library in (
        ("blocks.", "encoder.block."),
        (".norm1.", ".layer.0.layer_norm."),
        (".attn.", ".layer.0.SelfAttention."),
        (".pos_embedding.embedding.", ".layer.0.SelfAttention.relative_attention_bias."),
        (".norm2.", ".layer.1.layer_norm."),
        (".ffn.gate.0.", ".layer.1.DenseReluDense.wi_0."),
        (".ffn.fc1.", ".layer.1.DenseReluDense.wi_1."),
        (".ffn.fc2.", ".layer.1.DenseReluDense.wo."),
    ):
        name = name.replace(published, library)
    return name


def _clip_name(name: str) -> str | None:
    if not name.startswith("visual.") or name == "visual.head":
        return None
    for published, library in (
        ("visual.", ""),
        ("cls_embedding", "embeddings.class_embedding"),
        ("pos_embedding", "embeddings.position_embedding.weight"),
        ("patch_embedding.", "embeddings.patch_embedding."),
        ("pre_norm.", "pre_layrnorm."),
        ("post_norm.", "post_layernorm."),
        ("transformer.", "encoder.layers."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
        (".attn.proj.", ".self_attn.out_proj."),
        (".attn.", ".self_attn."),
        (".mlp.0.", ".mlp.fc1."),
        (".mlp.2.", ".mlp.fc2."),
    ):
        name = name.replace(published, library)
    return name


def _clip_tensors(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Splits the fused query, key and value, and drops the leading dimensions of 1 that the library has not."""
    if ".to_qkv." in name:
        query, key, value = tensor.chunk(3)
        prefix, _, suffix = name.partition("to_qkv")
        return [(f"{prefix}{part}_proj{suffix}", piece) for part, piece in (("q", query), ("k", key), ("v", value))]
    if name in ("visual.cls_embedding", "visual.pos_embedding"):
        return [(name, tensor.reshape(tensor.shape[-1:] if "cls" in name else tensor.shape[1:]))]
    return [(name, tensor)]


def _wav2vec2_name(name: str) -> str | None:
    name = name.removeprefix("wav2vec2.")
    if name.startswith(("masked_spec_embed", "quantizer.", "project_q.", "project_hid.", "lm_head.")):
        return None
    convolution = "encoder.pos_conv_embed.conv."
    return name.replace(convolution + "weight_g", convolution + "parametrizations.weight.original0").replace(
        convolution + "weight_v", convolution + "parametrizations.weight.original1"
    )


def _count_blocks(tensors: "_Tensors", prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors.names() if name.startswith(prefix)})


# Reading and placing tensors.


class _Tensors:
    """The tensors of one or more .safetensors or .pth files, by their published names."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._shapes = {file: _open(file)[0] for file in self.files}
        self._file_of = {name: file for file in self.files for name in self._shapes[file]}

    @classmethod
    def sharded(cls, index: Path) -> "_Tensors":
        """The shards that an index names; every tensor must lie in the shard that the index says."""
        weight_map: dict[str, str] = _entry(_read_json(index), "weight_map", index)
        tensors = cls(index.parent / file for file in sorted(set(weight_map.values())))
        for name, file in weight_map.items():
            if tensors._file_of.get(name) != index.parent / file:
                raise CheckpointError(
                    f"{index.parent / file} has no tensor {name!r}, which {index.name} expects there."
                )
        return tensors

    def names(self) -> dict[str, str]:
        """name → the same name: a stand-in for a state dict, for functions that rename one."""
        return {name: name for name in self._file_of}

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def shape(self, name: str) -> list[int]:
        if name not in self._file_of:
            raise CheckpointError(f"{_list(self.files)} has no tensor {name!r}; is it the published file?")
        return self._shapes[self._file_of[name]][name]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, memory-mapped, one at a time: copy it, do not keep it."""
        for file in self.files:
            waiting = list(self._shapes[file])
            while waiting:
                get, touched = _open(file)[1], 0
                while waiting and touched < _REMAP_BYTES:
                    tensor = get(waiting[0])
                    touched += tensor.nbytes
                    yield waiting.pop(0), tensor


def _plain(file: Path) -> StoredTensors:
    """One file's tensors, dequantised as they are read where optimum-quanto quantised them."""
    tensors = _Tensors([file])
    if not DequantizedTensors.quantized(tensors):
        return tensors
    return DequantizedTensors(tensors, _read_json(file.with_suffix(".json")))


def _open(file: Path) -> tuple[dict[str, list[int]], Callable[[str], Tensor]]:
    """A file's tensors: their shapes, and a function that maps one of them."""
    require(file, _REMEDY)
    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, framework="pt")
            names = handle.keys()
            return {name: list(handle.get_slice(name).get_shape()) for name in names}, handle.get_tensor
        # Only archives can be mapped; what torch.save wrote before 2020 is no archive and is read whole.
        with file.open("rb") as head:
            archive = head.read(2) == b"PK"
        tensors = torch.load(file, map_location="cpu", mmap=archive, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds something other than tensors, or is damaged; it is not loaded, since that could run code."
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is truncated or damaged: {reason}. Import it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{file} is not a plain mapping of names to tensors; is it the published file?")
    return {name: list(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__


def _fill(
    module: nn.Module,
    tensors: StoredTensors,
    rename: Rename,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    names: set[str] | None = None,
    convert: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]] = lambda name, tensor: [(name, tensor)],
    finish: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Give a module that has no storage yet its tensors, each cast and placed once; all must be there, and fit.

    `names`: the parameters to fill, all by default. `rename` turns a published name into the library's, or into None
    where the tensor is not needed; `convert` turns a published tensor into those that the library has in its place, and
    `finish` one of these, placed, into what is kept.
    """
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    expected = shapes.keys() if names is None else names
    missing = set(expected)
    for published, mapped in tensors.read():
        if rename(published) is None:
            continue
        file = tensors.file_of(published)
        for name, tensor in convert(published, mapped):
            target = rename(name)
            if target is None or target not in expected:
                raise CheckpointError(f"{file} has a tensor {published!r}, which this model does not know.")
            if list(tensor.shape) != shapes[target]:
                raise CheckpointError(
                    f"{file}: tensor {published!r} has shape {list(tensor.shape)}, expected {shapes[target]}."
                )
            missing.discard(target)
            placed = torch.empty_like(tensor, dtype=dtype_of(target), device=device).copy_(tensor)
            _place(module, target, finish(target, placed))
    if missing:
        first = f"{min(missing)!r}, in the library's words"
        raise CheckpointError(
            f"{_list(tensors.files)} lacks {len(missing)} of {len(expected)} tensors, such as {first}."
        )


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _read_json(file: Path) -> dict[str, Any]:
    require(file, _REMEDY)
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. Import it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object. Import it again.")
    return content


def _entry(config: dict[str, Any], key: str, file: Path) -> Any:
    if key not in config:
        raise CheckpointError(f"{file} has no entry {key!r}; is it the published file?")
    return config[key]


def _list(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
