"""What stage 1 trains on: clips of talking faces, encoded once by the VAE and kept as records.

The faces are endless and deterministic by index, so a folder is extended by asking for more clips.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from lavatar_jax.checkpoints import store
from lavatar_jax.checkpoints.runs import result_step, result_time
from lavatar_jax.checkpoints.store import config_from_dict, load_config, model_folder
from lavatar_jax.config import VAEConfig
from lavatar_jax.data import made_with
from lavatar_jax.data.batches import Batches
from lavatar_jax.data.faces import Identity, Motion, attention_map
from lavatar_jax.data.loader import ShardSource, record_batches
from lavatar_jax.data.records import Record
from lavatar_jax.data.references import snapshot
from lavatar_jax.data.shards import (
    DATASET,
    PREPARED,
    RENDERED,
    ShardWriter,
    read_dataset,
    stored_records,
)
from lavatar_jax.data.skipped import SKIPPED
from lavatar_jax.data.talking_clips import Clip, sample_clip
from lavatar_jax.errors import UserError
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.training.distributed import first_process_only
from lavatar_jax.training.finished import averaged_model
from lavatar_jax.training.loop import LoopConfig

STATISTICS_CLIPS = 400  # enough for the mean and deviation of a channel
SHARD_CLIPS = 50  # what a kill may cost: some 20 s of work
SOURCE = "rendered faces"  # in dataset.json of folders that are made here


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """Encoded clips. Every clip shows another person; `blocks` of 12 video frames follow its context.

    `text_len` and `text_dim` must be those of the DiT's configuration.
    """

    folder: str = "runs/latents"
    vae: str = "runs/vae"  # what encodes, and shows samples: a run of stage 0, or a model folder
    speech: str = "runs/speech"  # recordings, written by lavatar_jax.data.speech.write_corpus
    clips: int = 1600
    blocks: int = 4
    motion_frames: int = 9  # 1 + 4k video frames before the clip; the causal VAE's context in any case
    size: int = 128  # pixels
    other_pose: float = 0.5  # share of references in any pose, not a portrait's
    other_scene: float = 0.0  # share of those in another room and light too
    text_len: int = 16
    text_dim: int = 64

    @property
    def video_frames(self) -> int:
        return self.motion_frames + 12 * self.blocks

    @property
    def motion_latents(self) -> int:
        return (self.motion_frames - 1) // 4 + 1


def load_vae(place: str | Path) -> tuple[VAEConfig, CausalVAE]:
    """The averaged VAE of a stage 0 run, or the one of a model folder, for latents as they are in records:
    the statistics in its configuration are 0 and 1.

    Raises UserError."""
    if (Path(place) / "checkpoints").is_dir():
        path = Path(place) / "config.json"
        if not path.is_file():
            raise UserError(f"{place} is not a VAE run: {path} is missing; train stage 0 first")
        values = json.loads(path.read_text())
        config = config_from_dict(VAEConfig, values["model"])
        return config, averaged_model(Path(place), values, lambda rngs: make_vae(config, rngs=rngs))
    try:
        folder = model_folder(place)
        config = load_config(folder).vae
    except UserError as error:
        raise UserError(
            f"{place} is neither a run of stage 0 nor a model folder: train stage 0 first ({error})"
        ) from None
    channels = config.latent_channels
    config = dataclasses.replace(config, latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels)
    return config, store.load_vae(folder, config)


def clip_id(split: str, index: int) -> str:
    """The name of a rendered clip's record."""
    return f"{split}-{index:07d}"


def latent_statistics(records: Iterable[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel of the latents of records that have a `spread`.

    The deviation includes the encoder's own uncertainty, so that a channel that carries nothing is not blown
    up to unit variance. Raises UserError where there are no records.
    """
    count, total, squares, spreads = 0, 0.0, 0.0, []
    for record in records:
        latent = np.asarray(record["latent"], np.float64)
        latent = latent.reshape(-1, latent.shape[-1])
        count += len(latent)
        total, squares = total + latent.sum(axis=0), squares + np.square(latent).sum(axis=0)
        spreads.append(np.asarray(record["spread"], np.float64))
    if not count:
        raise UserError("there are no encoded clips to take statistics of; ask for at least one clip")
    mean = np.asarray(total / count)
    return mean, np.sqrt(squares / count - np.square(mean) + np.square(spreads).mean(axis=0))


def make_encoder(
    vae: CausalVAE, motion_frames: int
) -> Callable[[Clip, np.ndarray], dict[str, np.ndarray | str]]:
    """From a clip and a picture of the person to a record (`data.records`) with all that is known of it.

    The latents of the first `motion_frames` video frames are the record's motion, not part of the clip.
    """
    motion_latents = (motion_frames - 1) // 4 + 1

    @jax.jit
    def encode(video: jax.Array, photo: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, log_variance = vae.encode_distribution(video[None])
        photo_mean, _ = vae.encode_distribution(photo[None, None])
        return mean[0], photo_mean[0], jnp.exp(0.5 * log_variance).mean(axis=(0, 1, 2, 3))

    @functools.partial(jax.jit, static_argnums=2)
    def close_look(identity: Identity, motion: Motion, cells: int) -> jax.Array:
        # Mouth 1 and eyes 0.6: a blink moves few pixels for 5 frames, and is lost where the loss looks away.
        fine = attention_map(identity, motion, 4 * cells, mouth_weight=2.0, eye_weight=1.6)[..., 0] - 1.0
        mouth = fine.mean(axis=0).reshape(cells, 4, cells, 4).mean(axis=(1, 3))
        return jnp.round(255 * mouth / jnp.max(mouth))

    def encode_clip(clip: Clip, reference: np.ndarray) -> dict[str, np.ndarray | str]:
        latent, photo, spread = encode(clip.video, reference)
        return {
            "id": clip_id(clip.split, clip.index),
            "caption": clip.caption,
            "latent": np.asarray(latent[motion_latents:], np.float16),
            "motion": np.asarray(latent[:motion_latents], np.float16),
            "reference": np.asarray(photo, np.float16),
            "spread": np.asarray(spread, np.float16),
            "audio": clip.audio[:, :, motion_frames - 1 :].astype(np.float16),
            "openness": np.asarray(clip.motion.mouth_open[motion_frames:], np.float16),
            "mouth": np.asarray(close_look(clip.identity, clip.motion, latent.shape[1]), np.uint8),
        }

    return encode_clip


def draw_reference_picture(clip: Clip, config: LatentsConfig) -> np.ndarray:
    """The portrait of a clip's person, or another picture of them [size, size, 3]; deterministic by index."""
    random = np.random.default_rng([clip.index, 47])
    other_pose, other_scene = random.random(2) < (config.other_pose, config.other_scene)
    if not other_pose:
        return clip.reference
    return snapshot(clip.identity, clip.reference.shape[0], random, scene=bool(other_scene))


def prepare_latents(config: LatentsConfig) -> Path:
    """Encode what is missing of `config.clips` clips into `config.folder`; may be killed and repeated.

    A folder that was not rendered (`tools/prepare_data.py`), and any with `clips` 0, is only looked at.
    Raises UserError when it is not finished, when there is no VAE or no speech, or the folder holds clips
    that were made with other options.
    """
    folder = Path(config.folder)
    if not config.clips or not _is_rendered(folder):
        read_dataset(folder)
        return folder
    if config.motion_frames % 4 != 1:
        raise UserError(f"motion_frames must be 1 + 4k, not {config.motion_frames}: the VAE is causal")
    if config.blocks < 1:
        raise UserError(f"--data.blocks must be at least 1, not {config.blocks}")
    if (folder / DATASET).is_file():
        check_rendering(config)
        if read_dataset(folder).records >= config.clips:
            return folder
    rendering = _rendering(config)  # before the VAE is read, which may be training
    try:
        vae_config, vae = load_vae(config.vae)
    except UserError as error:
        raise UserError(f"{folder} has no {config.clips} clips, and none can be made: {error}") from None
    encode = make_encoder(vae, config.motion_frames)
    with ShardWriter(folder, shard_records=SHARD_CLIPS) as writer:
        if writer.rows:
            check_rendering(config)
            _check_same_kind(writer, config, vae_config)
        else:
            made_with.write_note(folder / RENDERED, rendering)
        missing = [index for index in range(config.clips) if clip_id("train", index) not in writer.ids]
        for index in track(missing, description="encoding clips"):
            clip = sample_clip(index, config.video_frames, config.size, "train", speech=Path(config.speech))
            writer.write(
                encode(clip, draw_reference_picture(clip, config)),
                w=config.size, h=config.size, fps=25, n_faces=1, licence="rendered",
            )  # fmt: skip
        writer.flush()
        mean, std = latent_statistics(stored_records(folder, writer.rows[:STATISTICS_CLIPS]))
        encoder = {"source": SOURCE, "vae": dataclasses.asdict(vae_config), "size": config.size}
        writer.finish(mean=mean, std=std, encoder=encoder)
    return folder


def _is_rendered(folder: Path) -> bool:
    """Whether a folder's clips were rendered here, or it has none yet."""
    if (folder / PREPARED).is_file():
        return False
    return not (folder / DATASET).is_file() or read_dataset(folder).encoder.get("source") == SOURCE


def _rendering(config: LatentsConfig) -> dict[str, Any]:
    """All that a rendered clip depends on, besides its number."""
    names = ("vae", "speech", "blocks", "motion_frames", "size", "other_pose", "other_scene")
    vae = Path(config.vae)
    return {
        **{name: getattr(config, name) for name in names},
        "vae_step": result_step(vae),
        "vae_time": result_time(vae),
    }


def check_rendering(config: LatentsConfig) -> None:
    """Raises UserError where the folder's clips were rendered or encoded with other options than these.

    What a folder of an earlier version does not tell, and the step of a VAE that is gone, is not compared.
    """
    made_with.check_rendering(Path(config.folder), _rendering(config))


def _check_same_kind(writer: ShardWriter, config: LatentsConfig, vae: VAEConfig) -> None:
    cells = config.size // vae.spatial_factor
    wanted = [3 * config.blocks, cells, cells, vae.latent_channels]
    found: Any = writer.rows[0]["shapes"]
    if found["latent"] != wanted:
        raise UserError(
            f"{writer.folder} has clips of shape {found['latent']}, not {wanted}; choose another folder"
        )


def open_latents(
    config: LatentsConfig,
    *,
    skipped_log: str | Path | None = None,
    held_out: int = 0,
    negative: bool = False,
) -> ShardSource:
    """The encoded clips as `record_batches` takes them. Raises UserError when there are none."""
    return ShardSource(
        config.folder,
        text_len=config.text_len,
        text_dim=config.text_dim,
        skipped_log=skipped_log,
        held_out=held_out,
        negative=negative,
    )


def open_training(
    data: LatentsConfig, train: LoopConfig, out: Path, *, held_out: int = 0, negative: bool = False
) -> tuple[ShardSource, Batches]:
    """Encode clips if needed -> (all records, endless batches). Raises UserError.

    Records that cannot be read are named in a file of the run's folder `out`. No batch has the last
    `held_out` records. `negative`: with the negative prompt (`ShardSource`).
    """
    first_process_only(lambda: prepare_latents(data))
    source = open_latents(data, skipped_log=out / SKIPPED, held_out=held_out, negative=negative)
    return source, record_batches(source, batch=train.batch, seed=train.seed, workers=train.workers)
