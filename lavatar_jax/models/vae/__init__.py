"""Causal 3-D video VAEs of the Wan 2.1 and Wan 2.2 architectures behind one interface."""

from lavatar_jax.models.vae.autoencoder import CausalVAE, VideoVAE, make_vae, to_pixels
from lavatar_jax.models.vae.wan22 import wan22_config

__all__ = ["CausalVAE", "VideoVAE", "make_vae", "to_pixels", "wan22_config"]
