"""Stage 1: diffusion forcing of the causal DiT (method section 4): every block has its own noise level."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.diffusion import TIMESTEPS, add_noise, shift_sigma, velocity
from lavatar_jax.evaluation.flops import clip_flops, step_flops
from lavatar_jax.models import rope as rp
from lavatar_jax.models.dit import CausalDiT, Remat
from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.models.rope import Rope
from lavatar_jax.parallel import STACKED, train_mesh
from lavatar_jax.training.checks import check_records
from lavatar_jax.training.latents import LatentsConfig, open_training
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.run import Run, fit_run, note_other_clips, run_step
from lavatar_jax.training.samples import make_evaluator, make_sampler
from lavatar_jax.training.state import LossFn, Merge, Params, TrainState, create_state, release
from lavatar_jax.training.weights import LoraConfig, initial_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcingConfig:
    """How noise levels, conditions and weights are drawn. Shares are probabilities."""

    shift: float = 3.0  # of noise levels towards 1
    clean_clips: float = 0.4  # share of the clips with nearly clean blocks in between
    clean_blocks: float = 0.5  # share of the blocks of such a clip
    clean_sigma: float = 0.05  # a nearly clean block's highest noise level; what is below is not learned
    same_level_clips: float = 0.3  # share with one level for all blocks, as the streaming cache has it
    sampled_levels: tuple[float, ...] = ()  # noise levels at which the sampler asks the network
    sampled_clips: float = 0.0  # share with one of those levels for all blocks
    sink_dropout: float = 0.1  # share of the steps without the reference
    other_reference: float = 0.25  # share with a latent frame of the clip instead of the photo's
    reference_noise: float = 0.1  # highest noise level of the reference, which may be a generated latent
    reference_frames: tuple[int, int] = (24, 36)  # range of the reference's temporal position
    audio_dropout: float = 0.0
    text_dropout: float = 0.1
    motion_dropout: float = 0.1  # share of the steps without the motion scaffold, for models that have one
    pose_dropout: float = 0.1
    mouth_weight: float = 3.0  # loss weight where the mouth is

    def __post_init__(self) -> None:
        if self.sampled_clips and not self.sampled_levels:
            raise ValueError("sampled_clips needs sampled_levels: the noise levels to draw from")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTRun(Run):
    """Everything that `train.py` can set for stage 1.

    `clip`: latent frames, rows and columns that `--plan` is made for; training takes what the records have.
    `unroll`: layers one after the other, not in a loop: slower to compile, faster on CPUs.
    """

    out: str = "runs/dit"
    model: DiTConfig
    data: LatentsConfig
    loss: ForcingConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)  # of the samples
    clip: tuple[int, int, int] = (12, 16, 16)
    unroll: bool = False

    def make(self, rngs: nnx.Rngs) -> CausalDiT:
        return CausalDiT(self.model, rngs=rngs)


def draw_sigmas(key: Array, batch: int, blocks: int, config: ForcingConfig) -> Float[Array, "B K"]:
    """Noise level of every block: independent; equal in some clips; in others with nearly clean blocks.

    A sampler of few steps only ever asks at few levels, the same for all blocks of its cache. Clips at just
    these levels (`sampled_clips`) spend a small network on what it will be asked.
    """
    level, kind, which, clean, same, asked = jax.random.split(key, 6)
    sigma = jax.random.uniform(level, (batch, blocks))
    kind = jax.random.uniform(kind, (batch, 1))
    one = jax.random.uniform(same, (batch, 1))
    sigma = shift_sigma(jnp.where(kind < config.same_level_clips, one, sigma), config.shift)
    has_clean = kind > 1.0 - config.clean_clips
    cleaned = jax.random.uniform(which, sigma.shape) < config.clean_blocks
    sigma = jnp.where(has_clean & cleaned, config.clean_sigma * jax.random.uniform(clean, sigma.shape), sigma)
    if not config.sampled_clips:
        return sigma
    share, choice = jax.random.split(asked)
    sampled = jax.random.uniform(share, (batch, 1)) < config.sampled_clips
    levels = jnp.asarray(config.sampled_levels, sigma.dtype)
    return jnp.where(sampled, jax.random.choice(choice, levels, (batch, 1)), sigma)


def draw_reference(
    key: Array, photo: Float[Array, "B 1 H W C"], clip: Float[Array, "B F H W C"], config: ForcingConfig
) -> Float[Array, "B 1 H W C"]:
    """The photo's latent, or one frame of the clip (what the adaptive sink makes of it), slightly noised."""
    choice, index, level, noise = jax.random.split(key, 4)
    batch, frames = clip.shape[:2]
    picked = jax.random.randint(index, (batch,), 0, frames)
    frame = clip[jnp.arange(batch), picked][:, None]
    other = jax.random.uniform(choice, (batch, 1, 1, 1, 1)) < config.other_reference
    reference = jnp.where(other, frame, photo)
    sigma = config.reference_noise * jax.random.uniform(level, (batch,))
    return add_noise(reference, jax.random.normal(noise, reference.shape), sigma)


def drop(key: Array, condition: Array, share: float) -> Array:
    """Set a condition [B, ...] to zero for a share of the batch."""
    keep = jax.random.uniform(key, (condition.shape[0],)) >= share
    return condition * keep.reshape(-1, *(1,) * (condition.ndim - 1))


def noise_motion(key: Array, motion: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
    """The motion scaffold: latent frames before the clip, each with a noise level of its own, t ~ U[0, 1000].

    So the model takes motion from the past, but cannot rely on its details (method section 4).
    """
    level, noise = jax.random.split(key)
    sigma = jax.random.uniform(level, motion.shape[:2])
    return add_noise(motion, jax.random.normal(noise, motion.shape), sigma)


def draw_rope(
    key: Array, model: DiTConfig, config: ForcingConfig, latent_size: tuple[int, int, int], motion: bool
) -> Rope:
    """Positions of noisy | reference | motion tokens, the reference at a frame of `reference_frames`."""
    frames, height, width = latent_size
    low, high = config.reference_frames
    rows, columns = height // model.patch, width // model.patch
    clip = rp.rope([rp.video_grid(0, frames, rows, columns)], model.head_dim)
    places = [rp.rope([rp.video_grid(f, 1, rows, columns)], model.head_dim) for f in range(low, high + 1)]
    choice = jax.random.randint(key, (), 0, len(places))
    reference = jax.tree.map(lambda *tables: jnp.stack(tables)[choice], *places)
    past = [rp.rope(rp.motion_grids(height, width, model.patch), model.head_dim)] if motion else []
    return jax.tree.map(lambda *tables: jnp.concatenate(tables), clip, reference, *past)


def draw_without(key: Array, config: ForcingConfig) -> Bool[Array, " 2"] | None:
    """Whether a step has no reference, and no motion frames: nobody sees those tokens."""
    if not (config.sink_dropout or config.motion_dropout):
        return None
    return jax.random.uniform(key, (2,)) < jnp.array([config.sink_dropout, config.motion_dropout])


def make_loss(
    merge: Merge[CausalDiT],
    model: DiTConfig,
    config: ForcingConfig,
    *,
    remat: Remat = "none",
    unroll: bool = False,
) -> LossFn:
    """`loss(params, frozen, batch, key)` of `run_step`, for batches of `record_batches` of any shape.

    Flow-matching loss on all blocks at once, except those that are nearly clean: they are context for the
    others. No sampler asks what their noise was, and it could hardly be told. Motion frames and pose are used
    where both the model and the batch have them.
    """

    def loss_fn(
        params: Params, frozen: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        dit: CausalDiT = merge(params, frozen)
        keys = jax.random.split(key, 9)
        x0 = batch["latent"].astype(jnp.float32)
        photo = batch["reference"].astype(jnp.float32)
        frames, height, width = x0.shape[1:4]
        size = frames, height, width
        has_motion = model.use_motion and "motion" in batch
        motion = noise_motion(keys[7], batch["motion"].astype(jnp.float32)) if has_motion else None
        pose = None
        if model.use_pose and "pose" in batch:
            pose = drop(keys[8], batch["pose"].astype(jnp.float32), config.pose_dropout)
        sigma = draw_sigmas(keys[0], x0.shape[0], size[0] // model.block_frames, config)
        sigma_BF = jnp.repeat(sigma, model.block_frames, axis=1)
        noise = jax.random.normal(keys[1], x0.shape)
        flow = train_forward(
            dit,
            add_noise(x0, noise, sigma_BF),
            TIMESTEPS * sigma_BF,
            text_BSE=drop(keys[4], batch["text"], config.text_dropout),
            audio=drop(keys[5], batch["audio"].astype(jnp.float32), config.audio_dropout),
            ref_B1HWC=draw_reference(keys[6], photo, x0, config),
            motion_BFHWC=motion,
            pose_BFHWC=pose,
            rope=draw_rope(keys[2], model, config, size, has_motion),
            blockwise_audio=True,
            without=draw_without(keys[3], config),
            remat=remat,
            unroll=unroll,
        )
        error = jnp.mean(jnp.square(flow - velocity(x0, noise)), axis=-1)  # [B, F, H, W]
        mouth = batch["mouth"].astype(jnp.float32)[:, None]  # [B, 1, H, W] in [0, 1]
        noisy = jnp.broadcast_to((sigma_BF > config.clean_sigma)[..., None, None], error.shape)

        def mean(weight: Array) -> Array:
            return jnp.sum(error * noisy * weight) / jnp.maximum(jnp.sum(noisy * weight), 1e-6)

        loss = mean(1.0 + (config.mouth_weight - 1.0) * mouth)
        return loss, {"flow": mean(jnp.ones(())), "mouth": mean(mouth)}

    return loss_fn


def train_dit(config: DiTRun) -> TrainState:
    """Encode the clips if needed, then train (or go on with) the DiT of `config.out`."""
    mesh, train = train_mesh(config.mesh), config.train
    source, batches = open_training(config.data, train, Path(config.out), held_out=config.samples.records)
    check_records(source, config.model)
    weights = initial_weights(config.make, mesh, init=config.init, seed=train.seed, adapters=config.lora)
    optimizer = make_optimizer(
        weights.params, stacked=STACKED, weight_decay=train.weight_decay, config=config.optim
    )
    size = source.buckets[0].latent_size
    note_other_clips(size[0], config.clip[0])
    merge = compute_in(weights.merge, train.precision)
    loss = make_loss(merge, config.model, config.loss, remat=train.remat, unroll=config.unroll)
    step_fn = run_step(config, loss, optimizer)
    state = create_state(weights.params, optimizer, train.seed, mesh=mesh)
    release(weights.params)
    motion = config.model.use_motion and "motion" in source.buckets[0].shapes
    forward = clip_flops(config.model, *size, motion=motion)
    flops = train.batch * step_flops(forward, lora=config.lora.rank > 0)
    sample = make_sampler(
        source,
        config.sampling,
        config.data.vae,
        lambda state: merge(state.average, weights.frozen),
        every=config.samples.every,
    )
    return fit_run(
        config,
        step_fn,
        state,
        weights.frozen,
        batches,
        mesh,
        flops=flops,
        evaluate=make_evaluator(source, loss, weights.frozen),
        sample=sample,
    )
