"""Models of a few thousand parameters, with random numbers in every one of them.

Fresh models have zeros where training begins as the identity (injectors, head); a test on those would
not notice a wrong operand. Filling the abstract model also saves compiling its initialisers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.config import DiTConfig, VAEConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.umt5 import UMT5Config, UMT5Encoder
from lavatar_jax.models.vae import CausalVAE, make_vae


def tiny_config(**changes) -> DiTConfig:
    """Two layers of width 16, the second with audio; 12 video frames a block, as everywhere."""
    config = DiTConfig(
        layers=2,
        width=16,
        heads=2,
        ffn_width=24,
        latent_channels=3,
        freq_dim=8,
        text_dim=6,
        text_len=4,
        audio_dim=5,
        audio_layers=2,
        inject_layers=(1,),
        use_motion=False,
        use_pose=False,
    )
    return dataclasses.replace(config, **changes)


def tiny_vae_config(**changes) -> VAEConfig:
    """Four times in time and in space, so that a block is 12 frames, as everywhere."""
    config = VAEConfig(
        kind="wan22",
        width=4,
        multipliers=(1, 2, 2),
        res_blocks=1,
        temporal_downsample=(True, True),
        latent_channels=3,
        latent_mean=(0.5, -1.0, 0.0),
        latent_std=(2.0, 0.5, 1.0),
    )
    return dataclasses.replace(config, **changes)


@functools.cache
def random_dit(config: DiTConfig, seed: int = 0) -> CausalDiT:
    return _random(jax.eval_shape(lambda: CausalDiT(config, rngs=nnx.Rngs(0))), seed)


@functools.cache
def random_vae(config: VAEConfig, seed: int = 0) -> CausalVAE:
    return _random(jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0))), seed)


@functools.cache
def random_umt5(config: UMT5Config, seed: int = 0) -> UMT5Encoder:
    return _random(jax.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))), seed)


def _random(abstract, seed: int):
    """Activations keep about unit variance; norms scatter around 1."""
    rng = np.random.default_rng(seed)

    def fill(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        stacked = path.startswith(("blocks.", "injectors."))
        shape = leaf.shape[1:] if stacked else leaf.shape
        x = rng.normal(size=leaf.shape)
        if len(shape) > 1:
            x = x / math.sqrt(math.prod(shape[:-1]))
        else:
            x = 0.2 * x + path.endswith((".weight", ".gamma"))
        return jnp.asarray(x, jnp.float32)

    leaves = [fill(path, leaf) for path, leaf in param_paths(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
