"""The video transformer: Wan2.1 image-to-video, with a voice that every block listens to.

`InfiniteTalkTransformer3DModel` is diffusers' `WanTransformer3DModel` plus the audio branch of InfiniteTalk
(arXiv:2508.14033): an `AudioProjection` that turns speech features into 32 tokens per latent frame, and in each block
an `AudioCrossAttention` between the text cross-attention and the feed-forward part.

Shapes: B batch, T latent frames, H x W latent height and width, S = T·(H/2)·(W/2) tokens, D model width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

TEMPORAL_STRIDE = 4
"""Video frames per latent frame, after the first latent frame, which holds a single one."""


class AudioProjection(nn.Module):
    """Speech features around each video frame → audio tokens for each latent frame."""

    def __init__(self, window: int, features: int, hidden: int, tokens: int, width: int) -> None:
        """features: layers x channels of the speech encoder per video frame; tokens of `width` per latent frame."""
        super().__init__()
        self.window, self.tokens, self.width = window, tokens, width
        # A later latent frame hears 8 slots (window 5): 3 of its first video frame, 1 of each middle, 3 of its last.
        slots = 2 * (window // 2 + 1) + TEMPORAL_STRIDE - 2
        self.proj1 = nn.Linear(window * features, hidden)
        self.proj1_vf = nn.Linear(slots * features, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, tokens * width)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, audio: Tensor) -> Tensor:
        """audio: [B, 1 + 4 (T - 1), window, layers, channels] → [B, T, tokens, width]."""
        middle = self.window // 2
        first, later = audio[:, :1], audio[:, 1:].unflatten(1, (-1, TEMPORAL_STRIDE))
        opening = later[:, :, 0, : middle + 1]
        between = later[:, :, 1:-1, middle]
        closing = later[:, :, -1, middle:]
        slots = torch.cat([opening, between, closing], dim=2)
        hidden = torch.cat([F.relu(self.proj1(first.flatten(2))), F.relu(self.proj1_vf(slots.flatten(2)))], dim=1)
        hidden = self.proj3(F.relu(self.proj2(hidden)))
        return self.norm(hidden.unflatten(2, (self.tokens, self.width)))


class AudioCrossAttention(nn.Module):
    """The tokens of each latent frame attend to that frame's audio tokens, and to no other's."""

    def __init__(self, dim: int, heads: int, audio_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_width, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, audio_tokens: Tensor) -> Tensor:
        """hidden_states: [B, S, D]; audio_tokens: [B, T, tokens, width] → [B, S, D]."""
        batch, frames = audio_tokens.shape[:2]
        query = self.q_linear(hidden_states).unflatten(1, (frames, -1)).flatten(0, 1).unflatten(2, (self.heads, -1))
        key_value = self.kv_linear(audio_tokens.flatten(0, 1)).unflatten(2, (2, self.heads, -1))
        key, value = key_value.unbind(2)
        heard = dispatch_attention_fn(query, key, value).flatten(2)
        return self.proj(heard.unflatten(0, (batch, frames)).flatten(1, 2))


class InfiniteTalkBlock(WanTransformerBlock):
    """A Wan block that also hears: self-attention, text and picture, voice, feed-forward."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float, image_width: int, audio_width: int) -> None:
        super().__init__(dim, ffn_dim, heads, "rms_norm_across_heads", True, eps, added_kv_proj_dim=image_width)
        self.norm_x = FP32LayerNorm(dim, eps, elementwise_affine=True)
        self.audio_cross_attn = AudioCrossAttention(dim, heads, audio_width)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        audio_tokens: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D] → [B, S, D]; temb: float32 [B, 6, D]; the audio branch is left out where there are no tokens."""
        dtype = hidden_states.dtype
        modulation = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation

        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).to(dtype)
        attended = self.attn1(normed, None, None, rotary_emb)
        hidden_states = (hidden_states.float() + attended * gate).to(dtype)

        normed = self.norm2(hidden_states.float()).to(dtype)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        if audio_tokens is not None:
            normed = self.norm_x(hidden_states.float()).to(dtype)
            hidden_states = hidden_states + self.audio_cross_attn(normed, audio_tokens)

        normed = (self.norm3(hidden_states.float()) * (1 + ff_scale) + ff_shift).to(dtype)
        return (hidden_states.float() + self.ffn(normed).float() * ff_gate).to(dtype)


class InfiniteTalkTransformer3DModel(WanTransformer3DModel):
    """The whole denoiser: noisy latents, a time and the conditions in; the predicted velocity out."""

    _no_split_modules: ClassVar = ["InfiniteTalkBlock"]
    _repeated_blocks: ClassVar = ["InfiniteTalkBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        out_channels: int,
        text_dim: int,
        freq_dim: int,
        ffn_dim: int,
        num_layers: int,
        image_dim: int,
        audio_features: int,
        audio_hidden: int,
        audio_tokens: int,
        audio_width: int,
        audio_window: int,
        eps: float,
    ) -> None:
        dim = num_attention_heads * attention_head_dim
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,
            image_dim=image_dim,
            added_kv_proj_dim=dim,
            eps=eps,
        )
        self.blocks = nn.ModuleList(
            InfiniteTalkBlock(dim, ffn_dim, num_attention_heads, eps, dim, audio_width) for _ in range(num_layers)
        )
        self.audio_proj = AudioProjection(audio_window, audio_features, audio_hidden, audio_tokens, audio_width)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor,
        audio: Tensor | None = None,
    ) -> Tensor:
        """One prediction.

        hidden_states: [B, in_channels, T, H, W]; timestep: float [B] in [0, 1000]; encoder_hidden_states: [B, 512,
        text_dim], the prompt padded with zeros; encoder_hidden_states_image: [B, 257, image_dim]; audio: [B, 1 + 4 (T -
        1), window, layers, channels], or None to leave the audio branch out → float32 [B, out_channels, T, H, W].
        """
        batch, _, frames, height, width = hidden_states.shape
        embedder = self.condition_embedder
        rotary = self.rope(hidden_states)
        audio_tokens = None if audio is None else self.audio_proj(audio)
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()

        # Time stays in float32 all the way into the blocks' modulation and the head, whatever the weights' type.
        temb = embedder.time_embedder(sinusoidal_embedding(timestep, self.config.freq_dim))
        modulation = embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))
        text = embedder.text_embedder(encoder_hidden_states)
        context = torch.cat([embedder.image_embedder(encoder_hidden_states_image), text], dim=1)

        for block in self.blocks:
            tokens = block(tokens, context, modulation, rotary, audio_tokens)

        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        patches = self.proj_out(self.norm_out(tokens.float()) * (1 + scale) + shift)
        patches = patches.view(batch, frames, height // 2, width // 2, 2, 2, self.config.out_channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """float [B] → float32 [B, dim]: cosines, then sines, at wavelengths rising geometrically to 2π·10000.

    In float64: at t = 1000 a float32 angle is already 3e-5 off.
    """
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2))
    angles = timestep.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()
