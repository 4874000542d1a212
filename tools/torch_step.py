"""A plain PyTorch streaming step of the same size as our transformer's, as a speed baseline.

Same layers, widths, tokens and cached keys; written the ordinary way (eager mode,
scaled_dot_product_attention), random weights. It only serves to be timed.
"""

# mypy: disable-error-code="operator,union-attr"
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from lavatar_jax.config import DiTConfig


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.heads = heads

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn, self.cross_attn = Attention(width, config.heads), Attention(width, config.heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.ffn_width), nn.GELU("tanh"), nn.Linear(config.ffn_width, width)
        )
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)


class Injector(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.adain = nn.Linear(config.width, 2 * config.width)
        self.attention = Attention(config.width, config.heads)


class StreamingStep(nn.Module):
    """One denoising step of one block with full rings: 3 latent frames in, velocity out."""

    def __init__(self, config: DiTConfig, height: int, width: int, ring_blocks: int) -> None:
        super().__init__()
        self.config, d = config, config.width
        self.frames, self.tokens = config.block_frames, height // config.patch * width // config.patch
        patch = config.patch**2 * config.latent_channels
        self.patch_embed, self.head = nn.Linear(patch, d), nn.Linear(d, patch)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.injectors = nn.ModuleDict({str(layer): Injector(config) for layer in config.inject_layers})
        block_tokens = self.frames * self.tokens
        ring, sink, half = ring_blocks * block_tokens, self.tokens, config.head_dim // 2
        cache = (config.layers, 1, config.heads, sink + ring, config.head_dim)
        self.k, self.v = torch.randn(cache), torch.randn(cache)
        self.sink_k = torch.randn(config.layers, 1, config.heads, sink, config.head_dim)
        self.text = [
            (torch.randn(1, config.heads, config.text_len, config.head_dim),) * 2
            for _ in range(config.layers)
        ]
        self.rope, self.sink_rope = torch.randn(2, block_tokens, half), torch.randn(2, sink, half)
        self.e0 = torch.randn(1, self.frames, 6, d)
        self.e = torch.randn(1, self.frames, 2, d)
        self.audio = torch.randn(self.frames, config.audio_tokens + 1, d)
        self.audio_global = torch.randn(self.frames, d)
        self.sink, self.block_tokens = sink, block_tokens

    def _per_frame(self, rows: Tensor) -> Tensor:
        return rows.repeat_interleave(self.tokens, dim=1)

    @torch.inference_mode()
    def forward(self, patches: Tensor, slot: int) -> Tensor:
        d = self.config.width
        x = self.patch_embed(patches)
        start = self.sink + slot * self.block_tokens
        here = slice(start, start + self.block_tokens)
        for layer, block in enumerate(self.blocks):
            rows = block.modulation + self.e0
            shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = map(self._per_frame, rows.unbind(2))
            h = layer_norm(x, (d,), eps=1e-6) * (1 + scale_sa) + shift_sa
            attn = block.self_attn
            k, v = attn.keys_values(h)
            self.k[layer][:, :, : self.sink] = rotate(self.sink_k[layer], *self.sink_rope)
            self.k[layer][:, :, here] = rotate(k, *self.rope)
            self.v[layer][:, :, here] = v
            x = x + gate_sa * attn(rotate(attn.queries(h), *self.rope), self.k[layer], self.v[layer])
            cross = block.cross_attn
            x = x + cross(cross.queries(block.norm3(x)), *self.text[layer])
            h = layer_norm(x, (d,), eps=1e-6) * (1 + scale_ff) + shift_ff
            x = x + gate_ff * block.ffn(h)
            if str(layer) in self.injectors:
                injector = self.injectors[str(layer)]
                shift, scale = injector.adain(nn.functional.silu(self.audio_global)).chunk(2, dim=-1)
                h = layer_norm(x.view(self.frames, self.tokens, d), (d,), eps=1e-5)
                h = h * (1 + scale[:, None]) + shift[:, None]
                attention = injector.attention
                k, v = attention.keys_values(self.audio)
                x = x + attention(attention.queries(h), k, v).view_as(x)
        shift, scale = map(self._per_frame, self.e.unbind(2))
        return self.head(layer_norm(x, (d,), eps=1e-6) * (1 + scale) + shift)
