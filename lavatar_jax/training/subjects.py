"""What `--plan` has to know of each stage: abstract weights, loss, and one sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lavatar_jax.data.clips import WEIGHT_STRIDE
from lavatar_jax.errors import UserError
from lavatar_jax.parallel import STACKED
from lavatar_jax.training import decoder, diffusion_forcing, vae
from lavatar_jax.training.decoder import DecoderRun
from lavatar_jax.training.diffusion_forcing import DiTRun
from lavatar_jax.training.distill import DistillRun, make_roles, make_step, sampler_rollout
from lavatar_jax.training.distill_state import create_distill_state
from lavatar_jax.training.draws import make_draw
from lavatar_jax.training.ode_init import OdeRun, make_ode_loss
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.plan import Subject
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.run import Run
from lavatar_jax.training.scores import make_denoiser
from lavatar_jax.training.state import LossFn, Metrics, Params, create_state
from lavatar_jax.training.student import begin_cache
from lavatar_jax.training.vae import VAERun
from lavatar_jax.training.weights import Weights, abstract_weights


def subject(run: Any) -> Subject:
    """Raises UserError for a stage that has no plan."""
    if isinstance(run, DiTRun | DistillRun) and run.model.attention == "cudnn":
        # The flash kernel cannot be traced everywhere, and keeps what the chunked attention keeps.
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, attention="chunked"))
    if isinstance(run, VAERun):
        return _vae(run)
    if isinstance(run, DiTRun):
        return _forcing(run)
    if isinstance(run, OdeRun):
        return _ode(run)
    if isinstance(run, DistillRun):
        return _distill(run)
    if isinstance(run, DecoderRun):
        return _decoder(run)
    raise UserError(f"--plan: there is none for a {type(run).__name__}")


def _state(run: Run, params: Params) -> Any:
    optimizer = make_optimizer(params, stacked=STACKED, weight_decay=run.train.weight_decay, config=run.optim)
    return jax.eval_shape(lambda params: create_state(params, optimizer, 0), params)


def _one_layer(run: Any) -> Any:
    """The same run with one layer, which hears speech, and nothing recomputed."""
    model = dataclasses.replace(run.model, layers=1, inject_layers=(0,))
    return dataclasses.replace(run, model=model, train=dataclasses.replace(run.train, remat="none"))


def _transformer(run: Any, loss_of: Callable[[Any], tuple[Weights[Any], LossFn]]) -> Subject:
    """A network that learns on clips by one loss; `loss_of(run)` is its weights and that loss."""
    weights, loss = loss_of(run)
    return Subject(
        weights=weights,
        state=_state(run, weights.params),
        loss=loss,
        batch=sample_of(run),
        layer=loss_of(_one_layer(run)),
        heads=run.model.heads,
    )


def _forcing(run: DiTRun) -> Subject:
    def loss_of(run: DiTRun) -> tuple[Weights[Any], LossFn]:
        weights = abstract_weights(run.make, run.lora)
        merge = compute_in(weights.merge, run.train.precision)
        # In a loop, whatever `run.unroll` says: what is kept of a layer is the same.
        return weights, diffusion_forcing.make_loss(merge, run.model, run.loss, remat=run.train.remat)

    return _transformer(run, loss_of)


def _distill(run: DistillRun) -> Subject:
    """The critic's step keeps most: it learns on a whole clip at once, the student on a block."""

    def loss_of(run: DistillRun) -> tuple[Weights[Any], LossFn]:
        weights, roles = abstract_weights(run.make, run.lora), make_roles(run)
        grid = sampler_rollout(run.rollout, run.sampling).grid

        def loss(params: Params, frozen: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
            dit = roles.critic(params, frozen)
            denoise = make_denoiser(dit, batch, run.score, grid, remat=run.train.remat)
            clip = batch["latent"]
            return jnp.mean(jnp.square(denoise(clip, jnp.full(clip.shape[:2], 500.0)))), {}

        return _with_teacher(run, weights), loss

    weights, loss = loss_of(run)
    _, optimizers = make_step(run, weights.params, [])
    state = jax.eval_shape(
        lambda params: create_distill_state(
            params, params, optimizers, steps=run.sampling.steps, rewards=0, seed=0
        ),
        weights.params,
    )
    if not run.rollout.replay:
        raise UserError("--plan counts a student that learns block by block: leave --rollout.no-replay out")
    batch, roles = sample_of(run), make_roles(run)
    draw = make_draw(
        run_in=run.distill.run_in,
        rollout=sampler_rollout(run.rollout, run.sampling),
        score=run.score,
        loss=run.loss,
        dyna=run.dyna,
    )
    _, drawn = jax.eval_shape(lambda batch: draw(jax.random.key(0), batch, run.model.block_frames), batch)

    def cache(params: Params, frozen: Params, batch: Any) -> Any:
        dit = roles.student(params, frozen)
        return begin_cache(dit, run.sampling, batch["reference"], batch["text"])

    return Subject(
        weights=weights,
        state=state,
        loss=loss,
        batch=batch,
        layer=loss_of(_one_layer(run)),
        drawn=drawn,
        cache=jax.eval_shape(cache, weights.params, weights.frozen, batch),
        heads=run.model.heads,
    )


def _with_teacher(run: DistillRun, weights: Weights[Any]) -> Weights[Any]:
    """Without adapters the frozen teacher is a whole network of its own."""
    return weights if run.lora.rank else weights._replace(frozen=weights.params)


def _ode(run: OdeRun) -> Subject:
    def loss_of(run: OdeRun) -> tuple[Weights[Any], LossFn]:
        weights = abstract_weights(run.make, run.lora)
        return _with_teacher(run, weights), make_ode_loss(run, make_roles(run))

    return _transformer(run, loss_of)


def sample_of(run: DiTRun | DistillRun) -> dict[str, jax.ShapeDtypeStruct]:
    """One record as `record_batches` gives it; only stage 1 knows motion frames."""
    model, (frames, height, width) = run.model, run.clip
    shapes: dict[str, tuple[int, ...]] = {
        "latent": (frames, height, width, model.latent_channels),
        "reference": (1, height, width, model.latent_channels),
        "audio": (1, model.audio_layers, model.audio_dim, 4 * frames),
        "text": (model.text_len, model.text_dim),
        "mouth": (height, width),
    }
    if model.use_motion and isinstance(run, DiTRun):
        shapes["motion"] = (model.motion_frames[1], height, width, model.latent_channels)
    if isinstance(run, DistillRun) and run.score.without_text == "negative":
        shapes["negative_text"] = shapes["text"]
    return {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}


def _vae(run: VAERun) -> Subject:
    weights = abstract_weights(run.make)
    loss = vae.make_loss(compute_in(weights.merge, run.train.precision), run.loss)
    data = run.data
    largest: tuple[int, ...] = (data.crop_frames, data.crop_size, data.crop_size)
    if data.full_share:
        source = vae.open_pixels(run)
        whole = [(data.frames, data.size, data.size)] if source is None else source.sizes
        largest = max(whole, key=math.prod)
    frames, height, width = largest
    batch = {
        "video": jax.ShapeDtypeStruct((1, frames, height, width, 3), jnp.uint8),
        "weight": jax.ShapeDtypeStruct(
            (1, frames, height // WEIGHT_STRIDE, width // WEIGHT_STRIDE), jnp.uint8
        ),
    }
    return Subject(weights=weights, state=_state(run, weights.params), loss=loss, batch=batch)


def _decoder(run: DecoderRun) -> Subject:
    weights = abstract_weights(run.make)
    loss = decoder.make_loss(compute_in(weights.merge, run.train.precision), run.loss)
    past, cells, factor = run.data.motion_latents, run.predictions.cells, run.model.spatial_factor
    frames, pixels, grid = 4 * past, cells * factor, cells * factor // WEIGHT_STRIDE
    batch = {
        "latent": jax.ShapeDtypeStruct((1, 2 * past, cells, cells, run.model.latent_channels), jnp.float16),
        "video": jax.ShapeDtypeStruct((1, frames, pixels, pixels, 3), jnp.uint8),
        "weight": jax.ShapeDtypeStruct((1, frames, grid, grid), jnp.uint8),
    }
    return Subject(weights=weights, state=_state(run, weights.params), loss=loss, batch=batch)
