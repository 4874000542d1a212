"""What stage 1 trains on: clips of talking faces, encoded once by the VAE and kept on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track

from lavatar_jax.checkpoints.runs import read_average
from lavatar_jax.checkpoints.store import config_from_dict
from lavatar_jax.config import VAEConfig
from lavatar_jax.data.faces import Identity, Motion, attention_map
from lavatar_jax.data.motion import MANNERS
from lavatar_jax.data.talking_clips import Clip, sample_clip
from lavatar_jax.errors import UserError
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.models.words import encode_words
from lavatar_jax.training.state import split_model

FILES = ("latent", "photo", "spread", "audio", "mouth", "manner")
SAVE_EVERY = 20  # clips


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """Encoded clips. Every clip shows another person; `blocks` of 12 video frames follow its first frame.

    `text_len` and `text_dim` must be those of the DiT's configuration.
    """

    folder: str = "runs/latents"
    vae: str = "runs/vae"  # the training run whose averaged weights encode
    speech: str = "runs/speech"  # recordings, written by lavatar_jax.data.speech.write_corpus
    clips: int = 1600
    blocks: int = 4
    size: int = 128  # pixels
    text_len: int = 16
    text_dim: int = 64

    @property
    def video_frames(self) -> int:
        return 1 + 12 * self.blocks


def load_vae(run: str | Path) -> tuple[VAEConfig, CausalVAE]:
    """The averaged VAE of a stage 0 run, with the latent statistics of its training (0 and 1)."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(f"{run} is not a VAE run: {path} is missing; train stage 0 first")
    config = config_from_dict(VAEConfig, json.loads(path.read_text())["model"])
    _, merge = split_model(jax.eval_shape(lambda: make_vae(config, rngs=nnx.Rngs(0))))
    return config, merge({name: jnp.asarray(value) for name, value in read_average(Path(run)).items()})


def latent_statistics(folder: str | Path, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel of the first `clips` encoded clips.

    The deviation includes the encoder's own uncertainty, so that a channel that carries nothing is not blown
    up to unit variance.
    """
    latent = np.load(Path(folder) / "latent.npy", mmap_mode="r")[:clips].astype(np.float64)
    spread = np.load(Path(folder) / "spread.npy", mmap_mode="r")[:clips].astype(np.float64)
    axes = tuple(range(latent.ndim - 1))
    return latent.mean(axis=axes), np.sqrt(latent.var(axis=axes) + np.square(spread).mean(axis=0))


def make_encoder(vae: CausalVAE) -> Callable[[Clip], dict[str, np.ndarray]]:
    """From a clip to the arrays that are kept of it (one row each of those that `prepare_latents` names)."""

    @jax.jit
    def encode(video: jax.Array, photo: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, log_variance = vae.encode_distribution(video[None])
        photo_mean, _ = vae.encode_distribution(photo[None, None])
        return mean[0, 1:], photo_mean[0], jnp.exp(0.5 * log_variance).mean(axis=(0, 1, 2, 3))

    @functools.partial(jax.jit, static_argnums=2)
    def mouth_map(identity: Identity, motion: Motion, cells: int) -> jax.Array:
        fine = attention_map(identity, motion, 4 * cells, mouth_weight=2.0, eye_weight=1.0)[..., 0] - 1.0
        mouth = fine.mean(axis=0).reshape(cells, 4, cells, 4).mean(axis=(1, 3))
        return jnp.round(255 * mouth / jnp.max(mouth))

    def encode_clip(clip: Clip) -> dict[str, np.ndarray]:
        latent, photo, spread = encode(clip.video, clip.reference)
        arrays = {
            "latent": latent,
            "photo": photo,
            "spread": spread,
            "audio": clip.audio,
            "mouth": mouth_map(clip.identity, clip.motion, latent.shape[1]),
            "manner": MANNERS.index(clip.manner),
        }
        return {name: np.asarray(value) for name, value in arrays.items()}

    return encode_clip


def prepare_latents(config: LatentsConfig) -> Path:
    """Encode what is missing of `config.clips` clips into `config.folder`; may be interrupted and repeated.

    Arrays: latent [N, F, h, w, Z] and photo [N, 1, h, w, Z] (raw means, float16), spread [N, Z] (the
    encoder's own deviation), audio [N, 1, A, 4 F], mouth [N, h, w] in 0..255, manner [N] (index in MANNERS);
    `statistics.json` at the end. Raises UserError when there is no VAE or no speech.
    """
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    vae_config, vae = load_vae(config.vae)
    arrays = _open_arrays(config, vae_config)
    done_file = folder / "done.txt"
    done = int(done_file.read_text()) if done_file.exists() else 0
    encode = make_encoder(vae)
    for index in track(range(done, config.clips), description="encoding clips"):
        clip = sample_clip(index, config.video_frames, config.size, "train", speech=Path(config.speech))
        for name, value in encode(clip).items():
            arrays[name][index] = value
        if (index + 1) % SAVE_EVERY == 0 or index + 1 == config.clips:
            for array in arrays.values():
                array.flush()
            temporary = done_file.with_suffix(".tmp")
            temporary.write_text(str(index + 1))
            os.replace(temporary, done_file)
    mean, std = latent_statistics(folder, min(config.clips, 400))
    (folder / "statistics.json").write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    return folder


def _open_arrays(config: LatentsConfig, vae: VAEConfig) -> dict[str, np.memmap]:
    cells, frames = config.size // vae.spatial_factor, 3 * config.blocks
    shapes = {
        "latent": ((frames, cells, cells, vae.latent_channels), np.float16),
        "photo": ((1, cells, cells, vae.latent_channels), np.float16),
        "spread": ((vae.latent_channels,), np.float16),
        "audio": ((1, LogMelConfig().dim, 4 * frames), np.float16),
        "mouth": ((cells, cells), np.uint8),
        "manner": ((), np.uint8),
    }
    arrays: dict[str, np.memmap] = {}
    for name, (shape, dtype) in shapes.items():
        path = Path(config.folder) / f"{name}.npy"
        shape = (config.clips, *shape)
        found = np.load(path, mmap_mode="r+") if path.exists() else None
        if found is not None and len(found) >= config.clips and found.shape[1:] == shape[1:]:
            arrays[name] = found
        else:
            (Path(config.folder) / "done.txt").unlink(missing_ok=True)
            arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    return arrays


class LatentSource:
    """Random access to encoded clips (a grain data source); latents are normalised per channel."""

    def __init__(self, config: LatentsConfig):
        folder = Path(config.folder)
        if not (folder / "statistics.json").is_file():
            raise UserError(f"{folder} has no encoded clips: run stage 1's preparation first")
        statistics = json.loads((folder / "statistics.json").read_text())
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r")[: config.clips] for name in FILES}
        self.mean, self.std = (np.array(statistics[name], np.float32) for name in ("mean", "std"))
        self.prompts = [encode_words(manner.caption, config.text_len, config.text_dim) for manner in MANNERS]

    def __len__(self) -> int:
        return len(self.arrays["latent"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        clip = {name: array[index] for name, array in self.arrays.items()}
        return {
            "latent": (clip["latent"].astype(np.float32) - self.mean) / self.std,
            "reference": (clip["photo"].astype(np.float32) - self.mean) / self.std,
            "audio": clip["audio"].astype(np.float32)[None],  # one speaker
            "mouth": clip["mouth"].astype(np.float32) / 255,
            "text": self.prompts[int(clip["manner"])],
        }


def latent_batches(source: LatentSource, *, batch: int, seed: int) -> grain.DatasetIterator:
    """Endless shuffled batches of the source's clips, as `diffusion_forcing.make_loss` takes them."""
    clips = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return iter(clips.to_iter_dataset().batch(batch))
