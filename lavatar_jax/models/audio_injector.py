"""Audio injection: after chosen layers, the noisy tokens of a frame attend to the frame's audio tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lavatar_jax.models.attention import Attention
from lavatar_jax.models.audio_encoder import AudioTokens
from lavatar_jax.models.layers import Linear, layer_norm, widen


class AudioInjector(nnx.Module):
    """AdaLayerNorm by the frame's global token, then cross-attention to its local tokens; no gate."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.adain = Linear(width, 2 * width, rngs=rngs, zero=True)
        self.attention = Attention(width, heads, rngs=rngs, zero_out=True)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        audio: AudioTokens,
        mask_BPFHW: Float[Array, "B P F H W"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Add the residuals of all speakers to the noisy tokens x (F frames of T / F tokens).

        `mask` routes each speaker's residual to places of the picture; None adds it everywhere.
        """
        batch, speakers, frames, _, width = audio.local.shape
        x_norm = layer_norm(x_BTD, eps=1e-5).reshape(batch, 1, frames, -1, width)
        # In bfloat16 1 + scale would be off by up to 0.4 %.
        modulation = widen(self.adain(jax.nn.silu(audio.global_)))
        shift, scale = jnp.split(modulation, 2, axis=-1)  # shift comes first
        queries = x_norm * (1 + scale[..., None, :]) + shift[..., None, :]

        def flat(y: Array) -> Array:
            return y.reshape(batch * speakers * frames, -1, width).astype(x_BTD.dtype)

        context = self.attention.keys_values(flat(audio.local))
        residual = self.attention.cross(flat(queries), context)
        residual = residual.reshape(batch, speakers, -1, width)
        if mask_BPFHW is not None:
            residual = residual * mask_BPFHW.reshape(batch, speakers, -1, 1)
        return x_BTD + residual.sum(axis=1).astype(x_BTD.dtype)
