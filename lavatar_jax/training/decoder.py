"""After the last stage of the transformer: the decoder learns to draw what the transformer predicts.

Predicted latents are not the encoder's: they are a little wrong everywhere, which a decoder that never saw
such latents shows as blotches. Here it sees what the sampler's last step makes of noised true clips, beside
the true frames. The encoder stays, so that the latents keep their meaning.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich.progress import track

from lavatar_jax.checkpoints.runs import result_step, result_time
from lavatar_jax.checkpoints.store import config_from_dict
from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.data.batches import EPOCHS, Batches, stacked
from lavatar_jax.data.clips import WEIGHT_STEP, WEIGHT_STRIDE, ClipArrays, ClipSource, unpack
from lavatar_jax.data.faces import attention_map
from lavatar_jax.data.made_with import first_difference, write_note
from lavatar_jax.data.talking_clips import sample_clip
from lavatar_jax.diffusion import TIMESTEPS, add_noise, v_to_x0
from lavatar_jax.errors import UserError
from lavatar_jax.inference.denoise import schedule
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.parallel import train_mesh
from lavatar_jax.training.distributed import first_process_only
from lavatar_jax.training.finished import averaged_model, dit_run
from lavatar_jax.training.latents import LatentsConfig, check_rendering, open_latents
from lavatar_jax.training.optim import make_optimizer
from lavatar_jax.training.precision import compute_in
from lavatar_jax.training.run import Run, fit_run, run_step
from lavatar_jax.training.samples import save_moving_pictures, to_host
from lavatar_jax.training.scores import Batch, ScoreConfig, make_flow
from lavatar_jax.training.state import (
    LossFn,
    Merge,
    Params,
    TrainState,
    create_state,
    release,
)
from lavatar_jax.training.vae import ENCODER, VAELossConfig, reconstruction_loss
from lavatar_jax.training.weights import initial_weights

CHUNK = 10  # clips that one forward predicts
NOTE = "predicted_by.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionsConfig:
    """Predicted latents of rendered clips on disk, and how batches are cut from them."""

    folder: str = "runs/predictions"
    clips: int = 600  # the first of the records
    cells: int = 8  # latent rows and columns of a window
    truth: float = 0.3  # share of the windows with the encoder's latents instead of predicted ones
    begin: float = 0.2  # share of the batches whose windows are beginnings of clips, with all their frames
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderRun(Run):
    """Everything that `train.py` can set. `init`: the VAE run that `data` was encoded with; `dit`: a run of
    stage 1 or 2 whose predictions are drawn."""

    out: str = "runs/decoder"
    init: str | None = "runs/vae"
    dit: str = "runs/distill"
    model: VAEConfig
    data: LatentsConfig
    predictions: PredictionsConfig
    sampling: SamplingConfig
    loss: VAELossConfig

    def make(self, rngs: nnx.Rngs) -> CausalVAE:
        return make_vae(self.model, rngs=rngs)


def load_dit(run: str | Path) -> CausalDiT:
    """The averaged transformer of a run of stage 1 or 2, with its adapters merged. Raises UserError."""
    values = dit_run(Path(run))
    config = config_from_dict(DiTConfig, values["model"])
    return averaged_model(Path(run), values, lambda rngs: CausalDiT(config, rngs=rngs))


def predict_clips(
    dit: CausalDiT, batch: Batch, noise: Float[Array, "B F H W C"], sigma: float
) -> Float[Array, "B F H W C"]:
    """What the network takes for the clean latents of true clips that were noised to one level."""
    truth = batch["latent"]
    flow = make_flow(dit, batch, ScoreConfig(kind="causal"))
    noisy = add_noise(truth, noise, sigma)
    return v_to_x0(noisy, flow(noisy, jnp.full(truth.shape[:2], TIMESTEPS * sigma)), sigma)


def prepare_predictions(config: DecoderRun) -> None:
    """Predict and render what is missing; may be killed and repeated. Raises UserError.

    Writes `latent.npy` float16 [N, 2, F, h, w, Z], predicted and true, as the decoder takes them, with the
    latents before the clip in front; `video.npy` and `weight.npy` as `data.clips.render_clips`.
    """
    check_rendering(config.data)
    source, given = open_latents(config.data), config.predictions
    if config.samples.records >= given.clips:
        raise UserError(
            f"--samples.records {config.samples.records} leaves no clip to train on: "
            f"--predictions.clips is {given.clips}"
        )
    if given.clips > len(source):
        raise UserError(
            f"{config.data.folder} has {len(source)} records, fewer than --predictions.clips {given.clips}: "
            "give at most as many"
        )
    if any(not name.startswith("train-") for name in source.ids[: given.clips]):
        raise UserError(
            f"{config.data.folder} has records that were not rendered: this stage cannot draw their frames"
        )
    size, past = config.data.size, config.data.motion_latents
    frames, height, width = source.buckets[0].latent_size
    if not 1 <= given.cells <= min(height, width):
        raise UserError(f"--predictions.cells {given.cells} is not within the latents' {height} x {width}")
    if frames < past:
        raise UserError(
            f"a window takes {past} latents after as many of the past (--data.motion-frames), the clips in "
            f"{config.data.folder} have {frames}: prepare longer ones (--data.blocks)"
        )
    sigma = float(schedule(config.sampling).sigmas[-2])
    made_by = _check_same_predictions(config, sigma)
    small = (config.data.video_frames, size // WEIGHT_STRIDE, size // WEIGHT_STRIDE)
    kept = ClipArrays(
        Path(given.folder),
        given.clips,
        {
            "latent": ((2, past + frames, height, width, config.model.latent_channels), np.float16),
            "video": ((config.data.video_frames, size, size, 3), np.uint8),
            "weight": (small, np.uint8),
        },
    )
    if kept.done >= given.clips:
        return
    dit = load_dit(config.dit)
    write_note(Path(given.folder) / NOTE, made_by)
    predict = jax.jit(functools.partial(predict_clips, sigma=sigma))
    look = jax.jit(lambda identity, motion: attention_map(identity, motion, size))
    for start in track(range(kept.done, given.clips, CHUNK), description="predicting clips"):
        stop = min(start + CHUNK, given.clips)
        # Always of one size, so that nothing is compiled twice.
        batch = source.read_batch(np.minimum(np.arange(start, start + CHUNK), given.clips - 1))
        key = jax.random.fold_in(jax.random.key(given.seed), start)
        predicted = predict(dit, batch, jax.random.normal(key, batch["latent"].shape))
        pair = np.stack([np.asarray(predicted), batch["latent"]], axis=1)
        front = np.repeat(batch["motion"][:, None], 2, axis=1)
        latent = np.concatenate([front, pair], axis=2) * source.std + source.mean
        kept.arrays["latent"][start:stop] = latent[: stop - start]
        for index in range(start, stop):
            # Where a record could not be read, another one stands in: its frames belong to these latents.
            number = int(source.ids[batch["record"][index - start]].removeprefix("train-"))
            clip = sample_clip(
                number, config.data.video_frames, size, "train", speech=Path(config.data.speech)
            )
            weight = look(clip.identity, clip.motion)[:, ::WEIGHT_STRIDE, ::WEIGHT_STRIDE, 0]
            kept.arrays["video"][index] = np.round((clip.video + 1) * 127.5)
            kept.arrays["weight"][index] = np.round(np.asarray(weight) / WEIGHT_STEP)
        kept.finish(stop)


def _check_same_predictions(config: DecoderRun, sigma: float) -> dict[str, Any]:
    """A folder keeps predictions of one network, as it was at one step of its training, of the same noise.

    Returns the note of these. Raises UserError where the folder's are others."""
    folder, step = Path(config.predictions.folder), result_step(Path(config.dit))
    made_by = {
        "dit": config.dit,
        "latents": config.data.folder,
        "step": step,
        "time": result_time(Path(config.dit)),
        "sigma": sigma,
        "seed": config.predictions.seed,
    }
    if (difference := first_difference(folder / NOTE, made_by)) is None:
        return made_by
    name, found, wanted = difference
    what = {
        "dit": f"of {found}, not of {wanted}",
        "latents": f"for {found}, not for {wanted}",
        "step": f"of step {found} of {config.dit}, not of its step {wanted}",
        "time": f"of another training of {config.dit} than the one that is there now",
        "sigma": f"at noise level {found}, not {wanted} (--sampling)",
        "seed": f"of --predictions.seed {found}, not {wanted}",
    }[name]
    raise UserError(
        f"{folder} has predictions {what}: choose another --predictions.folder, or remove that one"
    )


def random_window(
    clip: dict[str, np.ndarray], rng: np.random.Generator, *, past: int, cells: int, truth: float, begin: bool
) -> dict[str, np.ndarray]:
    """A block as large as the clip's `past` latents before it, both latents, and the block's own frames.

    `begin`: the clip's first such latents, and all of their frames.
    """
    latent = clip["latent"][int(rng.random() < truth)]
    block = past if begin else int(rng.integers(1, len(latent) // past)) * past
    # Latent 0 is one frame, every other one four.
    shown = slice(0 if begin else 4 * block - 3, 4 * (block + past) - 3)
    top, left = (int(rng.integers(0, side - cells + 1)) for side in latent.shape[1:3])
    pixels = clip["video"].shape[1] // latent.shape[1]
    result = {"latent": latent[block - past : block + past, top : top + cells, left : left + cells]}
    for name, scale in (("video", pixels), ("weight", pixels // WEIGHT_STRIDE)):
        rows, columns = (slice(scale * first, scale * (first + cells)) for first in (top, left))
        result[name] = clip[name][shown, rows, columns]
    return {name: np.ascontiguousarray(array) for name, array in result.items()} | {"record": clip["record"]}


def predicted_clips(config: PredictionsConfig, clips: slice) -> ClipSource:
    """Random access to some clips in a folder of `prepare_predictions`."""
    return ClipSource(config.folder, ("latent", "video", "weight"), clips)


def window_batches(
    config: PredictionsConfig, past: int, held_out: int = 0, *, batch: int, workers: int = 0
) -> Batches:
    """Endless batches of windows of all clips but the last `held_out`: `latent` [B, 2 past, c, c, Z], and
    `video`, `weight` and `record` as `data.clips`: frames of the last `past` latents, or of all of them where
    the windows begin with the clips."""
    source = predicted_clips(config, slice(config.clips - held_out))

    def windows(begin: bool) -> grain.MapDataset:
        cut = functools.partial(random_window, past=past, cells=config.cells, truth=config.truth, begin=begin)
        clips = grain.MapDataset.source(source).seed(config.seed + begin)
        return clips.shuffle().repeat(EPOCHS).random_map(cut)

    kinds = [(begin, share) for begin, share in ((False, 1 - config.begin), (True, config.begin)) if share]

    def order(part: int, parts: int) -> grain.MapDataset:
        batches = [stacked(windows(begin), batch, part, parts) for begin, _ in kinds]
        return grain.MapDataset.mix(batches, weights=[share for _, share in kinds])

    return Batches(order, workers=workers, counted=batch)


def make_loss(merge: Merge[CausalVAE], config: VAELossConfig) -> LossFn:
    """`loss(params, frozen, batch, key)` of `run_step`, for batches of `window_batches`.

    What the decoder remembers of the latents before the window is given: no gradient goes through it. A
    beginning is drawn with nothing before it, as that of a stream.
    """

    def loss_fn(
        params: Params, frozen: Params, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        model: CausalVAE = merge(params, frozen)
        video, weight = unpack(batch)
        latent = batch["latent"].astype(jnp.float32)
        before, window = jnp.split(latent, 2, axis=1)
        if video.shape[1] > 4 * window.shape[1]:
            drawn = model.decode(latent)
        else:
            _, cache = model.stream_decode(before, None, first=True)
            drawn, _ = model.stream_decode(window, jax.lax.stop_gradient(cache), first=False)
        return reconstruction_loss(drawn, video, weight, config)

    return loss_fn


def make_sampler(
    config: DecoderRun, model_of: Callable[[TrainState], CausalVAE]
) -> Callable[[TrainState, Path], None] | None:
    """`sample` of `loop.fit`: the true frames of the last clips, and what is drawn of their predictions."""
    count, given = config.samples.records, config.predictions
    if not count:
        return None
    held_out = predicted_clips(given, slice(given.clips - count, given.clips))
    draw = jax.jit(lambda vae, latent: jnp.clip(vae.decode(latent.astype(jnp.float32)), -1, 1))

    def sample(state: TrainState, folder: Path) -> None:
        vae, pairs = model_of(state), []
        clips = [held_out[index] for index in range(count)]  # nothing fails later, while all draw together
        for index, clip in enumerate(clips):
            truth = clip["video"].astype(np.float32) / 127.5 - 1.0
            drawn = to_host(draw(vae, clip["latent"][:1]))[0]
            pairs.append((f"clip{index}", np.concatenate([truth, drawn], axis=2)))
        save_moving_pictures(pairs, folder)

    return sample


def train_decoder(config: DecoderRun) -> TrainState:
    """Predict clips if needed, then train (or go on with) the decoder in `config.out`. Raises UserError."""
    train = config.train
    mesh = train_mesh(config.mesh, samples=train.batch // train.accumulate)
    first_process_only(lambda: prepare_predictions(config))
    weights = initial_weights(config.make, mesh, init=config.init, component="vae", seed=train.seed)
    optimizer = make_optimizer(
        weights.params, weight_decay=train.weight_decay, config=config.optim, still=ENCODER
    )
    step_fn = run_step(config, make_loss(compute_in(weights.merge, train.precision), config.loss), optimizer)
    state = create_state(weights.params, optimizer, train.seed, mesh=mesh)
    release(weights.params)
    held_out = config.samples.records
    past = config.data.motion_latents
    batches = window_batches(config.predictions, past, held_out, batch=train.batch, workers=train.workers)
    sample = make_sampler(config, lambda state: weights.merge(state.average, weights.frozen))
    return fit_run(config, step_fn, state, weights.frozen, batches, mesh, sample=sample)
