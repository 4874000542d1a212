"""What `--plan` has to know of each stage: abstract weights, loss, and one sample."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lavatar_jax.data.clips import WEIGHT_STRIDE
from lavatar_jax.errors import UserError
from lavatar_jax.training import diffusion_forcing, vae
from lavatar_jax.training.diffusion_forcing import DiTRun
from lavatar_jax.training.plan import Subject
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.vae import VAERun
from lavatar_jax.training.weights import abstract_weights


def subject(run: Any) -> Subject:
    """Raises UserError for a stage that has no plan."""
    if isinstance(run, DiTRun):
        return _forcing(run)
    if isinstance(run, VAERun):
        return _vae(run)
    raise UserError(f"--plan: not for a {type(run).__name__}, only for stages 0 and 1")


def _forcing(run: DiTRun) -> Subject:
    # The flash kernel cannot be traced everywhere, and keeps what the chunked attention keeps.
    attention = "chunked" if run.model.attention == "cudnn" else run.model.attention
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention=attention))

    def loss_of(run: DiTRun) -> tuple[Any, Any]:
        weights = abstract_weights(run.make, run.lora)
        merge = compute_in(weights.merge, run.train.precision)
        loss = diffusion_forcing.make_loss(merge, run.model, run.loss, remat=run.train.remat)
        return weights, loss

    weights, loss = loss_of(run)
    single = dataclasses.replace(run.model, layers=1, inject_layers=(0,))
    layer = loss_of(
        dataclasses.replace(run, model=single, train=dataclasses.replace(run.train, remat="none"))
    )
    return Subject(weights=weights, loss=loss, batch=_sample(run), layer=layer, heads=run.model.heads)


def _sample(run: DiTRun) -> dict[str, jax.ShapeDtypeStruct]:
    """One record as `record_batches` gives it."""
    model, (frames, height, width) = run.model, run.clip
    shapes: dict[str, tuple[int, ...]] = {
        "latent": (frames, height, width, model.latent_channels),
        "reference": (1, height, width, model.latent_channels),
        "audio": (1, model.audio_layers, model.audio_dim, 4 * frames),
        "text": (model.text_len, model.text_dim),
        "mouth": (height, width),
    }
    if model.use_motion:
        shapes["motion"] = (model.motion_frames[1], height, width, model.latent_channels)
    return {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}


def _vae(run: VAERun) -> Subject:
    weights = abstract_weights(run.make)
    loss = vae.make_loss(compute_in(weights.merge, run.train.precision), run.loss)
    size, frames = run.data.size, run.data.frames
    grid = (size // WEIGHT_STRIDE, size // WEIGHT_STRIDE)
    batch = {
        "video": jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.uint8),
        "weight": jax.ShapeDtypeStruct((1, frames, *grid), jnp.uint8),
    }
    return Subject(weights=weights, loss=loss, batch=batch, layer=None)
