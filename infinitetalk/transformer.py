"""The video transformer: Wan2.1 image-to-video, with voices that every block listens to.

`InfiniteTalkTransformer3DModel` is diffusers' `WanTransformer3DModel` plus the audio branch of InfiniteTalk
(arXiv:2508.14033): an `AudioProjection` that turns speech features into 32 tokens per latent frame, and in each block
an `AudioCrossAttention` between the text cross-attention and the feed-forward part. There may be several such
branches beside the one base, trained for one speaker and for two; each forward names the one it uses.

Shapes: B batch, T latent frames, H x W latent height and width, S = T·(H/2)·(W/2) tokens, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from infinitetalk.label_rope import attention_to_regions, rotary, token_positions, turn, voice_positions

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


@dataclass(frozen=True)
class Voices:
    """What the blocks hear."""

    branch: str
    """Which audio branch listens."""
    tokens: Tensor
    """[B, T, speakers · tokens, width]; of two speakers, those of the first come first."""
    regions: Tensor | None
    """Of two speakers, bool [3, tokens of a frame]: where the first is, the second, and neither (B is 1 then)."""


class AudioCrossAttention(nn.Module):
    """The tokens of each latent frame attend to that frame's audio tokens, and to no other's."""

    def __init__(self, dim: int, heads: int, audio_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(audio_width, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor, audio_tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """hidden_states: [B, S, D]; audio_tokens: [B, T, tokens, width] → [B, S, D].

        positions: float32 [S], of two speakers: which of them each token listens to (see `label_rope`).
        """
        batch, frames, heard_tokens = audio_tokens.shape[:3]
        query = self.q_linear(hidden_states).unflatten(2, (self.heads, -1))
        key_value = self.kv_linear(audio_tokens.flatten(0, 1)).unflatten(2, (2, self.heads, -1))
        key, value = key_value.unbind(2)
        if positions is not None:
            head_dim = query.shape[-1]
            query = turn(query, rotary(positions, head_dim))
            key = turn(key, rotary(voice_positions(heard_tokens // 2, key.device), head_dim))
        heard = dispatch_attention_fn(query.unflatten(1, (frames, -1)).flatten(0, 1), key, value).flatten(2)
        return self.proj(heard.unflatten(0, (batch, frames)).flatten(1, 2))


class SelfAttention(WanAttnProcessor):
    """The library's, but that it also tells how much each token looks at each of some regions of the first frame."""

    def __call__(self, attn: Any, hidden_states: Tensor, *conditions: Any, regions: Tensor | None = None) -> Any:
        """→ [B, S, D]; with regions (bool [R, tokens of a frame]) also float32 [R, S]."""
        rotations = conditions[2]
        query = turn(attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)), rotations)
        key = turn(attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1)), rotations)
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        attended = attn.to_out[0](attended.flatten(2))
        return attended if regions is None else (attended, attention_to_regions(query, key, regions))


class InfiniteTalkBlock(WanTransformerBlock):
    """A Wan block that also hears: self-attention, text and picture, voices, feed-forward."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        eps: float,
        image_width: int,
        audio_width: int,
        audio_branches: Sequence[str],
    ) -> None:
        super().__init__(dim, ffn_dim, heads, "rms_norm_across_heads", True, eps, added_kv_proj_dim=image_width)
        self.attn1.set_processor(SelfAttention())
        self.norm_x = nn.ModuleDict({name: FP32LayerNorm(dim, eps, elementwise_affine=True) for name in audio_branches})
        self.audio_cross_attn = nn.ModuleDict(
            {name: AudioCrossAttention(dim, heads, audio_width) for name in audio_branches}
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
        voices: Voices | None = None,
    ) -> Tensor:
        """[B, S, D] → [B, S, D]; temb: float32 [B, 6, D]; rotary_emb: complex64 [S, 1, d / 2] for a head width of d;
        without voices the audio branch is left out."""
        dtype = hidden_states.dtype
        modulation = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation

        normed = modulated_norm(hidden_states, scale, shift, self.norm1.eps)
        regions = None if voices is None else voices.regions
        attended = self.attn1(normed, None, None, rotary_emb, regions=regions)
        attended, looks = (attended, None) if regions is None else attended
        hidden_states = add_gated(hidden_states, attended, gate)

        normed = self.norm2(hidden_states.float()).to(dtype)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        if voices is not None:
            normed = self.norm_x[voices.branch](hidden_states.float()).to(dtype)
            positions = None if looks is None else token_positions(looks)
            hidden_states = hidden_states + self.audio_cross_attn[voices.branch](normed, voices.tokens, positions)

        normed = modulated_norm(hidden_states, ff_scale, ff_shift, self.norm3.eps)
        return add_gated(hidden_states, self.ffn(normed), ff_gate)


# Modulation in float32, rounded once to the type of the states, in as few passes over memory as torch's own kernels
# allow: written out, it moves two to five times the bytes, which is a tenth of a forward on a GPU.


def modulated_norm(states: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """[B, S, D] → norm(states) · (1 + scale) + shift; scale, shift: float32 [B, 1, D]."""
    normed = torch.empty_like(states)
    for into, sample, weight, bias in zip(normed, states, 1 + scale, shift, strict=True):
        into.copy_(F.layer_norm(sample.float(), weight.shape[1:], weight[0], bias[0], eps))
    return normed


def add_gated(states: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """[B, S, D] → states + added · gate; gate: float32 [B, 1, D]."""
    return torch.addcmul(states, added, gate, out=torch.empty_like(states))


# So that diffusers' own caches (`enable_cache`) know where the block's outcome is.
TransformerBlockRegistry.register(InfiniteTalkBlock, TransformerBlockMetadata(return_hidden_states_index=0))


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
        audio_branches: Sequence[str],
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
            InfiniteTalkBlock(dim, ffn_dim, num_attention_heads, eps, dim, audio_width, audio_branches)
            for _ in range(num_layers)
        )
        self.audio_proj = nn.ModuleDict(
            {
                name: AudioProjection(audio_window, audio_features, audio_hidden, audio_tokens, audio_width)
                for name in audio_branches
            }
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor,
        audio: Tensor | None = None,
        branch: str = "single",
        regions: Tensor | None = None,
        cache: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None,
    ) -> Tensor:
        """One prediction.

        hidden_states: [B, in_channels, T, H, W]; timestep: float [B] in [0, 1000]; encoder_hidden_states: [B, 512,
        text_dim], the prompt padded with zeros; encoder_hidden_states_image: [B, 257, image_dim]; audio: [B, speakers,
        1 + 4 (T - 1), window, layers, channels] for one of the `audio_branches`, or None to leave the audio out;
        regions: of two speakers, bool [2, H / 2, W / 2], where each of them is in the given frame (B is 1 then);
        cache: stands between the blocks and what they are given, see `cache.TeaCache` → float32 [B, out_channels, T, H,
        W].
        """
        batch, _, frames, height, width = hidden_states.shape
        embedder = self.condition_embedder
        cosines, sines = (table[0, :, :, ::2] for table in self.rope(hidden_states))  # each is there twice
        rotations = torch.complex(cosines.float(), sines.float())
        voices = None if audio is None else self._voices(audio, branch, regions)
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()

        # Time stays in float32 all the way into the blocks' modulation and the head, whatever the weights' type.
        temb = embedder.time_embedder(sinusoidal_embedding(timestep, self.config.freq_dim))
        modulation = embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))
        text = embedder.text_embedder(encoder_hidden_states)
        context = torch.cat([embedder.image_embedder(encoder_hidden_states_image), text], dim=1)

        def blocks(tokens: Tensor) -> Tensor:
            for block in self.blocks:
                tokens = block(tokens, context, modulation, rotations, voices)
            return tokens

        tokens = blocks(tokens) if cache is None else cache(modulation, tokens, blocks)

        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        patches = self.proj_out(self.norm_out(tokens.float()) * (1 + scale) + shift)
        patches = patches.view(batch, frames, height // 2, width // 2, 2, 2, self.config.out_channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    def _voices(self, audio: Tensor, branch: str, regions: Tensor | None) -> Voices:
        batch, speakers = audio.shape[:2]
        tokens = self.audio_proj[branch](audio.flatten(0, 1)).unflatten(0, (batch, speakers))
        if speakers == 1:
            regions = None
        elif regions is not None:
            regions = torch.cat([regions, ~regions.any(dim=0, keepdim=True)]).flatten(1)
        else:
            raise ValueError("two speakers need regions, to tell who is where")
        return Voices(branch, tokens.transpose(1, 2).flatten(2, 3), regions)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """float [B] → float32 [B, dim]: cosines, then sines, at wavelengths rising geometrically to 2π·10000.

    In float64: at t = 1000 a float32 angle is already 3e-5 off.
    """
    frequencies = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2))
    angles = timestep.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()
