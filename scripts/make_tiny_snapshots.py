"""Write the three model snapshots in their published layout, a few MB in all, with random weights.

    python scripts/make_tiny_snapshots.py DIR

Every folder, file and tensor has the name it has in the Hugging Face repositories Wan-AI/Wan2.1-I2V-14B-480P,
TencentGameMate/chinese-wav2vec2-base and MeiGen-AI/InfiniteTalk, so whatever loads these loads the real ones. The
`*_layout` functions below are the documentation of that layout: name → shape, in terms of the sizes. The videos made
with such weights are coloured noise. The same seed gives the same bytes.
"""

import argparse
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

Layout = dict[str, tuple[int, ...]]
"""Tensor name → shape."""

# The sizes, and in the comments those of the published models.
DIM, HEADS, FFN_DIM, LAYERS = 64, 2, 128, 2  # the video transformer: 5120, 40, 13824, 40
LATENTS, FREQUENCIES, PATCH = 16, 256, (1, 2, 2)  # the same
TEXT_DIM, TEXT_HEADS, TEXT_FFN_DIM, TEXT_LAYERS, TEXT_VOCABULARY = 64, 4, 128, 2, 256  # 4096, 64, 10240, 24, 256384
IMAGE_DIM, IMAGE_LAYERS, IMAGE_SIZE, IMAGE_PATCH, IMAGE_OUT = 64, 4, 224, 14, 32  # CLIP: 1280, 32, 224, 14, 1024
CAPTION_DIM, CAPTION_LAYERS, CAPTION_VOCABULARY, CAPTION_LENGTH = 16, 1, 256, 514  # 1024, 24, 250002, 514; never used
VAE_DIM, VAE_MULTIPLIERS, VAE_BLOCKS = 4, (1, 2, 4, 4), 2  # 96, (1, 2, 4, 4), 2
VAE_TIME_STRIDES = (1, 2, 2)  # the same: of the three resamplers that halve height and width, two also halve time
SPEECH_DIM, SPEECH_FFN_DIM, SPEECH_LAYERS, SPEECH_CHANNELS = 32, 64, 12, 16  # wav2vec2: 768, 3072, 12, 512
SPEECH_KERNELS, SPEECH_STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # the same: 320 samples to a frame
POSITION_KERNEL, POSITION_GROUPS = 128, 16  # the same
CODEBOOKS, CODES, CODE_DIM = 2, 320, 32  # 2, 320, 256; pre-training only, never used
AUDIO_WINDOW, AUDIO_HIDDEN, AUDIO_TOKENS, AUDIO_DIM = 5, 64, 32, 48  # 5, 512, 32, 768

SHARDS = 7
README = """# {name}: a tiny stand-in

Random weights in the file and tensor layout of [{repository}](https://huggingface.co/{repository}), for tests and
demonstrations without a GPU. It is not the published model and makes coloured noise.
Written by `scripts/make_tiny_snapshots.py --seed {seed}`.
"""


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Layout:
    """A linear layer, as torch names and shapes it."""
    weight: Layout = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def conv(name: str, inputs: int, outputs: int, *kernel: int) -> Layout:
    """A convolution with a bias."""
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Layout:
    """A LayerNorm or GroupNorm with an affine part."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def transformer_layout() -> Layout:
    """Wan2.1's image-to-video transformer. The `img_emb` and `*_img` keys are what image-to-video adds."""
    channels = LATENTS + 4 + LATENTS  # noise, mask, picture
    layout = conv("patch_embedding", channels, DIM, *PATCH)
    layout |= linear("text_embedding.0", TEXT_DIM, DIM) | linear("text_embedding.2", DIM, DIM)
    layout |= linear("time_embedding.0", FREQUENCIES, DIM) | linear("time_embedding.2", DIM, DIM)
    layout |= linear("time_projection.1", DIM, 6 * DIM)
    layout |= norm("img_emb.proj.0", IMAGE_DIM) | linear("img_emb.proj.1", IMAGE_DIM, IMAGE_DIM)
    layout |= linear("img_emb.proj.3", IMAGE_DIM, DIM) | norm("img_emb.proj.4", DIM)
    for i in range(LAYERS):
        block = f"blocks.{i}"
        layout |= {f"{block}.modulation": (1, 6, DIM)} | norm(f"{block}.norm3", DIM)
        for projection in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"):
            layout |= linear(f"{block}.{projection}", DIM, DIM)
        for projection in ("q", "k", "v", "o", "k_img", "v_img"):
            layout |= linear(f"{block}.cross_attn.{projection}", DIM, DIM)
        for rms_norm in ("self_attn.norm_q", "self_attn.norm_k"):
            layout |= {f"{block}.{rms_norm}.weight": (DIM,)}
        for rms_norm in ("norm_q", "norm_k", "norm_k_img"):
            layout |= {f"{block}.cross_attn.{rms_norm}.weight": (DIM,)}
        layout |= linear(f"{block}.ffn.0", DIM, FFN_DIM) | linear(f"{block}.ffn.2", FFN_DIM, DIM)
    layout |= {"head.modulation": (1, 2, DIM)} | linear("head.head", DIM, LATENTS * prod(PATCH))
    return layout


def audio_layout() -> Layout:
    """What InfiniteTalk adds to that transformer: the audio projection and, in each block, an audio cross-attention."""
    features = SPEECH_LAYERS * SPEECH_DIM  # of one video frame
    slots = 2 * (AUDIO_WINDOW // 2 + 1) + 2  # of the four video frames in a latent frame: 3 + 1 + 1 + 3
    layout = linear("audio_proj.proj1", AUDIO_WINDOW * features, AUDIO_HIDDEN)
    layout |= linear("audio_proj.proj1_vf", slots * features, AUDIO_HIDDEN)
    layout |= linear("audio_proj.proj2", AUDIO_HIDDEN, AUDIO_HIDDEN)
    layout |= linear("audio_proj.proj3", AUDIO_HIDDEN, AUDIO_TOKENS * AUDIO_DIM) | norm("audio_proj.norm", AUDIO_DIM)
    for i in range(LAYERS):
        attention = f"blocks.{i}.audio_cross_attn"
        layout |= norm(f"blocks.{i}.norm_x", DIM)
        layout |= linear(f"{attention}.q_linear", DIM, DIM) | linear(f"{attention}.kv_linear", AUDIO_DIM, 2 * DIM)
        layout |= linear(f"{attention}.proj", DIM, DIM)
    return layout


def t5_layout() -> Layout:
    """The encoder of umt5-xxl: no biases, relative positions in every layer."""
    layout: Layout = {"token_embedding.weight": (TEXT_VOCABULARY, TEXT_DIM)}
    for i in range(TEXT_LAYERS):
        block = f"blocks.{i}"
        for projection in "qkvo":
            layout |= linear(f"{block}.attn.{projection}", TEXT_DIM, TEXT_DIM, bias=False)
        layout |= linear(f"{block}.ffn.gate.0", TEXT_DIM, TEXT_FFN_DIM, bias=False)
        layout |= linear(f"{block}.ffn.fc1", TEXT_DIM, TEXT_FFN_DIM, bias=False)
        layout |= linear(f"{block}.ffn.fc2", TEXT_FFN_DIM, TEXT_DIM, bias=False)
        layout |= {f"{block}.norm1.weight": (TEXT_DIM,), f"{block}.norm2.weight": (TEXT_DIM,)}
        layout |= {f"{block}.pos_embedding.embedding.weight": (32, TEXT_HEADS)}
    return layout | {"norm.weight": (TEXT_DIM,)}


def clip_layout() -> Layout:
    """open-clip's XLM-RoBERTa + ViT-H. Only `visual.*` serves; the text half and the two heads are dead weight."""
    width, tokens = IMAGE_DIM, 1 + (IMAGE_SIZE // IMAGE_PATCH) ** 2
    layout: Layout = {
        "log_scale": (),
        "visual.cls_embedding": (1, 1, width),
        "visual.pos_embedding": (1, tokens, width),
        "visual.head": (width, IMAGE_OUT),
        "visual.patch_embedding.weight": (width, 3, IMAGE_PATCH, IMAGE_PATCH),
    }
    for i in range(IMAGE_LAYERS):
        block = f"visual.transformer.{i}"
        layout |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        layout |= linear(f"{block}.attn.to_qkv", width, 3 * width) | linear(f"{block}.attn.proj", width, width)
        layout |= linear(f"{block}.mlp.0", width, 4 * width) | linear(f"{block}.mlp.2", 4 * width, width)
    layout |= norm("visual.pre_norm", width) | norm("visual.post_norm", width)

    width = CAPTION_DIM
    for table, rows in {"token": CAPTION_VOCABULARY, "type": 1, "pos": CAPTION_LENGTH}.items():
        layout |= {f"textual.{table}_embedding.weight": (rows, width)}
    for i in range(CAPTION_LAYERS):
        block = f"textual.blocks.{i}"
        layout |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        for projection in "qkvo":
            layout |= linear(f"{block}.attn.{projection}", width, width)
        layout |= linear(f"{block}.ffn.0", width, 4 * width) | linear(f"{block}.ffn.2", 4 * width, width)
    middle = (width + IMAGE_OUT) // 2
    layout |= norm("textual.norm", width) | linear("textual.head.0", width, middle, bias=False)
    return layout | linear("textual.head.2", middle, IMAGE_OUT, bias=False)


def vae_layout() -> Layout:
    """Wan2.1's causal 3D autoencoder: 8 x 8 pixels and 4 frames to a latent of 16 channels."""
    widths = [VAE_DIM * multiplier for multiplier in VAE_MULTIPLIERS]
    layout = conv("encoder.conv1", 3, widths[0], 3, 3, 3)
    i, width = 0, widths[0]
    for stage, outputs in enumerate(widths):
        for _ in range(VAE_BLOCKS):
            layout |= vae_residual_block(f"encoder.downsamples.{i}", width, outputs)
            i, width = i + 1, outputs
        if stage < len(VAE_TIME_STRIDES):
            layout |= conv(f"encoder.downsamples.{i}.resample.1", width, width, 3, 3)
            if VAE_TIME_STRIDES[stage] == 2:
                layout |= conv(f"encoder.downsamples.{i}.time_conv", width, width, 3, 1, 1)
            i += 1
    layout |= vae_middle("encoder", width)
    layout |= {"encoder.head.0.gamma": (width, 1, 1, 1)} | conv("encoder.head.2", width, 2 * LATENTS, 3, 3, 3)
    layout |= conv("conv1", 2 * LATENTS, 2 * LATENTS, 1, 1, 1) | conv("conv2", LATENTS, LATENTS, 1, 1, 1)

    layout |= conv("decoder.conv1", LATENTS, width, 3, 3, 3) | vae_middle("decoder", width)
    i = 0
    for stage, outputs in enumerate(reversed(widths)):
        for _ in range(VAE_BLOCKS + 1):
            layout |= vae_residual_block(f"decoder.upsamples.{i}", width, outputs)
            i, width = i + 1, outputs
        if stage < len(VAE_TIME_STRIDES):  # upsampling also halves the channels
            layout |= conv(f"decoder.upsamples.{i}.resample.1", width, width // 2, 3, 3)
            if VAE_TIME_STRIDES[-1 - stage] == 2:
                layout |= conv(f"decoder.upsamples.{i}.time_conv", width, 2 * width, 3, 1, 1)
            i, width = i + 1, width // 2
    return layout | {"decoder.head.0.gamma": (width, 1, 1, 1)} | conv("decoder.head.2", width, 3, 3, 3, 3)


def vae_residual_block(name: str, inputs: int, outputs: int) -> Layout:
    """Norm, convolution, norm, convolution; a 1 x 1 x 1 shortcut where the width changes."""
    layout: Layout = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
    layout |= conv(f"{name}.residual.2", inputs, outputs, 3, 3, 3)
    layout |= conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
    return layout | conv(f"{name}.shortcut", inputs, outputs, 1, 1, 1) if inputs != outputs else layout


def vae_middle(half: str, width: int) -> Layout:
    """Between two residual blocks, an attention within each frame."""
    layout = vae_residual_block(f"{half}.middle.0", width, width) | vae_residual_block(f"{half}.middle.2", width, width)
    layout |= {f"{half}.middle.1.norm.gamma": (width, 1, 1)} | conv(f"{half}.middle.1.to_qkv", width, 3 * width, 1, 1)
    return layout | conv(f"{half}.middle.1.proj", width, width, 1, 1)


def wav2vec2_layout() -> Layout:
    """transformers' Wav2Vec2ForPreTraining, with the names that weight normalisation had before torch 2."""
    layout: Layout = {"wav2vec2.masked_spec_embed": (SPEECH_DIM,)}
    inputs = 1
    for i, kernel in enumerate(SPEECH_KERNELS):
        layout |= {f"wav2vec2.feature_extractor.conv_layers.{i}.conv.weight": (SPEECH_CHANNELS, inputs, kernel)}
        inputs = SPEECH_CHANNELS
    layout |= norm("wav2vec2.feature_extractor.conv_layers.0.layer_norm", SPEECH_CHANNELS)
    layout |= norm("wav2vec2.feature_projection.layer_norm", SPEECH_CHANNELS)
    layout |= linear("wav2vec2.feature_projection.projection", SPEECH_CHANNELS, SPEECH_DIM)
    position = "wav2vec2.encoder.pos_conv_embed.conv"
    layout |= {f"{position}.bias": (SPEECH_DIM,), f"{position}.weight_g": (1, 1, POSITION_KERNEL)}
    layout |= {f"{position}.weight_v": (SPEECH_DIM, SPEECH_DIM // POSITION_GROUPS, POSITION_KERNEL)}
    layout |= norm("wav2vec2.encoder.layer_norm", SPEECH_DIM)
    for i in range(SPEECH_LAYERS):
        layer = f"wav2vec2.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layout |= linear(f"{layer}.attention.{projection}", SPEECH_DIM, SPEECH_DIM)
        layout |= linear(f"{layer}.feed_forward.intermediate_dense", SPEECH_DIM, SPEECH_FFN_DIM)
        layout |= linear(f"{layer}.feed_forward.output_dense", SPEECH_FFN_DIM, SPEECH_DIM)
        layout |= norm(f"{layer}.layer_norm", SPEECH_DIM) | norm(f"{layer}.final_layer_norm", SPEECH_DIM)
    layout |= {"quantizer.codevectors": (1, CODEBOOKS * CODES, CODE_DIM // CODEBOOKS)}
    layout |= linear("quantizer.weight_proj", SPEECH_CHANNELS, CODEBOOKS * CODES)
    return layout | linear("project_q", CODE_DIM, CODE_DIM) | linear("project_hid", SPEECH_DIM, CODE_DIM)


def mean_and_deviation(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Of the normal distribution a tensor is drawn from: activations stay of order one through the network."""
    leaf = name.rpartition(".")[2]
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return 1.0, 0.1  # a norm
    if leaf == "bias":
        return 0.0, 0.02
    if leaf == "log_scale":
        return 2.66, 0.0  # CLIP's logit scale, ln(1 / 0.07)
    if leaf == "weight_g":
        return (SPEECH_DIM / POSITION_KERNEL) ** 0.5, 0.02  # what makes the normalised weight scale with its fan-in
    if leaf == "modulation" or "embedding" in leaf or "token_embedding" in name:
        return 0.0, shape[-1] ** -0.5
    return 0.0, prod(shape[1:]) ** -0.5  # fan-in


def draw(seed: int, file: str, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of one file. Each has its own random stream, named by the file and the key."""
    tensors = {}
    for name, shape in layout.items():
        # NumPy's generator, not torch's: its bytes do not depend on the processor's vector instructions.
        random = np.random.default_rng([seed, zlib.crc32(f"{file}:{name}".encode())])
        mean, deviation = mean_and_deviation(name, shape)
        values = mean + deviation * random.standard_normal(shape, dtype=np.float32)
        tensors[name] = torch.from_numpy(np.asarray(values, dtype=np.float32)).to(dtype)
    return tensors


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_wan(folder: Path, seed: int) -> None:
    """Wan2.1-I2V-14B-480P: transformer in float32 shards, T5 in bfloat16, CLIP in float16, autoencoder in float32."""
    write_wan_configs(folder)
    for shard in range(SHARDS):
        write_shard(folder, seed, shard)
    for write in (write_t5, write_clip, write_vae):
        write(folder, seed)


def write_wan_configs(folder: Path) -> None:
    """All that holds no weights."""
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": DIM,
        "eps": 1e-06,
        "ffn_dim": FFN_DIM,
        "freq_dim": FREQUENCIES,
        "in_dim": LATENTS + 4 + LATENTS,
        "model_type": "i2v",
        "num_heads": HEADS,
        "num_layers": LAYERS,
        "out_dim": LATENTS,
        "text_len": 512,
    }
    write_json(folder / "config.json", config)
    files = {name: shard_file(shard) for shard in range(SHARDS) for name in shard_layout(shard)}
    total_size = sum(4 * prod(shape) for shape in transformer_layout().values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)
    for tokenizer in ("google/umt5-xxl", "xlm-roberta-large"):
        write_tokenizer(folder / tokenizer)


def write_shard(folder: Path, seed: int, shard: int) -> None:
    tensors = draw(seed, "diffusion_pytorch_model", shard_layout(shard))
    save_file(tensors, folder / shard_file(shard), metadata={"format": "pt"})


def shard_file(shard: int) -> str:
    return f"diffusion_pytorch_model-{1 + shard:05d}-of-{SHARDS:05d}.safetensors"


def shard_layout(shard: int) -> Layout:
    """The keys in alphabetical order, cut into equal runs."""
    layout = transformer_layout()
    names = sorted(layout)
    return {name: layout[name] for i, name in enumerate(names) if i * SHARDS // len(names) == shard}


def write_t5(folder: Path, seed: int) -> None:
    torch.save(text_encoder(seed), folder / "models_t5_umt5-xxl-enc-bf16.pth")


def write_clip(folder: Path, seed: int) -> None:
    clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(draw(seed, clip, clip_layout(), torch.float16), folder / clip)


def write_vae(folder: Path, seed: int) -> None:
    torch.save(draw(seed, "Wan2.1_VAE.pth", vae_layout()), folder / "Wan2.1_VAE.pth")


def base_transformer(seed: int) -> dict[str, Tensor]:
    return draw(seed, "diffusion_pytorch_model", transformer_layout())


def text_encoder(seed: int) -> dict[str, Tensor]:
    tensors = draw(seed, "models_t5", t5_layout(), torch.bfloat16)
    for i in range(TEXT_LAYERS):
        # T5 does not divide its attention scores by the root of the head's width: its queries are that much smaller.
        tensors[f"blocks.{i}.attn.q.weight"] /= (TEXT_DIM // TEXT_HEADS) ** 0.5
    return tensors


def write_tokenizer(folder: Path) -> None:
    """One token per character and a final </s>; characters beyond ASCII are <unk>."""
    folder.mkdir(parents=True)
    special = ["<pad>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(ord(" "), ord("~") + 1)]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(WordLevel(vocabulary, "<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", names)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", names | settings)


def write_wav2vec2(folder: Path, seed: int) -> None:
    """chinese-wav2vec2-base: transformers' pytorch_model.bin and, unused, the fairseq checkpoint it came from."""
    config = {
        "architectures": ["Wav2Vec2ForPreTraining"],
        "model_type": "wav2vec2",
        "hidden_size": SPEECH_DIM,
        "num_hidden_layers": SPEECH_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": SPEECH_FFN_DIM,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "do_stable_layer_norm": False,
        "feat_extract_norm": "group",
        "feat_extract_activation": "gelu",
        "num_feat_extract_layers": len(SPEECH_KERNELS),
        "conv_bias": False,
        "conv_dim": [SPEECH_CHANNELS] * len(SPEECH_KERNELS),
        "conv_kernel": SPEECH_KERNELS,
        "conv_stride": SPEECH_STRIDES,
        "num_conv_pos_embeddings": POSITION_KERNEL,
        "num_conv_pos_embedding_groups": POSITION_GROUPS,
        "num_codevector_groups": CODEBOOKS,
        "num_codevectors_per_group": CODES,
        "codevector_dim": CODE_DIM,
        "proj_codevector_dim": CODE_DIM,
        "vocab_size": 32,
        "torch_dtype": "float32",
    }
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "sampling_rate": 16000,
        "feature_size": 1,
        "do_normalize": True,
        "return_attention_mask": False,
        "padding_side": "right",
        "padding_value": 0.0,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor)
    torch.save(draw(seed, "pytorch_model.bin", wav2vec2_layout()), folder / "pytorch_model.bin")
    fairseq = "chinese-wav2vec2-base-fairseq-ckpt.pt"
    layout = {"mask_emb": (SPEECH_DIM,)} | linear("post_extract_proj", SPEECH_CHANNELS, SPEECH_DIM)
    torch.save({"model": draw(seed, fairseq, layout)}, folder / fairseq)


def write_infinitetalk(folder: Path, seed: int) -> None:
    """InfiniteTalk: the audio branch for one person and for two, and whole quantised models."""
    (folder / "comfyui").mkdir()
    for people in ("single", "multi"):
        path = write_audio_branch(folder, seed, people)
        shutil.copyfile(path, folder / "comfyui" / f"infinitetalk_{people}.safetensors")
    try:
        import optimum.quanto  # noqa: F401  (seconds to import, so only here)
    except ModuleNotFoundError as missing:
        print(f"InfiniteTalk/quant_models is left out: it takes optimum-quanto ({missing})")
    else:
        write_quantized(folder / "quant_models", seed)


def write_audio_branch(folder: Path, seed: int, people: str) -> Path:
    path = folder / people / "infinitetalk.safetensors"
    path.parent.mkdir()
    save_file(audio_branch(seed, people), path, metadata={"format": "pt"})
    return path


def audio_branch(seed: int, people: str) -> dict[str, Tensor]:
    return draw(seed, f"{people}/infinitetalk.safetensors", audio_layout())


def write_quantized(folder: Path, seed: int) -> None:
    """optimum-quanto's state dict and quantisation map of whole transformers (base + audio branch) and of the T5."""
    folder.mkdir()
    for bits, weights in {"fp8": "qfloat8", "int8": "qint8"}.items():
        for people in ("single", "multi"):
            whole = base_transformer(seed) | audio_branch(seed, people)
            for suffix, tensors in {"": whole, "_lora": with_lora(seed, whole)}.items():
                path = folder / f"infinitetalk_{people}_{bits}{suffix}.safetensors"
                write_json(path.with_suffix(".json"), save_quantized(path, tensors, weights))
        modules = save_quantized(folder / f"t5_{bits}.safetensors", text_encoder(seed), weights)
        write_json(folder / f"t5_map_{bits}.json", modules)
    # The published folder has this one too. Nothing reads it; here it is one of the maps.
    shutil.copyfile(folder / "infinitetalk_single_int8.json", folder / "quant.json")


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether this is the weight of a linear layer: the only other matrices are embedding tables."""
    return name.endswith(".weight") and tensor.ndim == 2 and not name.endswith("embedding.weight")


def with_lora(seed: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A step-distillation LoRA merged in: here of rank one, W + up · down."""
    merged = dict(tensors)
    for name, weight in tensors.items():
        if is_linear(name, weight) and "audio" not in name:
            outputs, inputs = weight.shape
            lora = draw(seed, "lora", {f"{name}.up": (outputs, 1), f"{name}.down": (1, inputs)})
            merged[name] = weight + 0.1 * inputs**-0.5 * lora[f"{name}.up"] * lora[f"{name}.down"]
    return merged


def module_tree(tensors: dict[str, Tensor]) -> nn.Module:
    """Modules nested as the keys say: linear layers where the model has them, elsewhere bare parameters."""
    root = nn.Module()
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = root
        for part in path.split("."):
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            parent, module = module, getattr(module, part)
        if is_linear(name, tensor):
            outputs, inputs = tensor.shape
            module = nn.Linear(inputs, outputs, bias=f"{path}.bias" in tensors, dtype=tensor.dtype)
            parent.add_module(part, module)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def save_quantized(path: Path, tensors: dict[str, Tensor], weights: str) -> dict[str, dict[str, str]]:
    """Quantise the linear layers to `weights` ("qfloat8" or "qint8"), write the tensors, return the map of modules."""
    from optimum.quanto import freeze, quantization_map, quantize

    model = module_tree(tensors)
    quantize(model, weights=weights)
    freeze(model)
    save_file(model.state_dict(), path, metadata={"format": "pt"})
    # The map names the type as it was asked for, as the published maps do; quanto writes qfloat8 out as qfloat8_e4m3fn.
    return {module: entry | {"weights": weights} for module, entry in quantization_map(model).items()}


SNAPSHOTS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "Wan2.1-I2V-14B-480P": ("Wan-AI/Wan2.1-I2V-14B-480P", write_wan),
    "chinese-wav2vec2-base": ("TencentGameMate/chinese-wav2vec2-base", write_wav2vec2),
    "InfiniteTalk": ("MeiGen-AI/InfiniteTalk", write_infinitetalk),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when written, 2 when the arguments are wrong or a snapshot is already there."""
    parser = argparse.ArgumentParser(
        description="Write tiny model snapshots in the published layout, with random weights: "
        + ", ".join(f"DIR/{name}" for name in SNAPSHOTS),
        epilog="About 20 MB in some seconds. With optimum-quanto installed, InfiniteTalk/quant_models is written too.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the three folders go; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="0 or more; the same seed gives the same bytes (default 0)")
    options = parser.parse_args(arguments)
    directory: Path = options.directory
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; it has to be 0 or more")
    if directory.exists() and not directory.is_dir():
        parser.error(f"{directory} is a file; give a folder")
    for name in SNAPSHOTS:
        target = directory / name
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            parser.error(f"{target} is already there; remove it or give another folder")

    directory.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that a folder with its final name is always complete.
    with tempfile.TemporaryDirectory(prefix=".tiny-snapshots-", dir=directory) as workspace:
        for name, (repository, write) in SNAPSHOTS.items():
            folder = Path(workspace) / name
            folder.mkdir()
            readme = README.format(name=name, repository=repository, seed=options.seed)
            (folder / "README.md").write_text(readme, encoding="utf-8")
            write(folder, options.seed)
        for name in SNAPSHOTS:
            target = (Path(workspace) / name).rename(directory / name)
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            print(f"{target}  {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
