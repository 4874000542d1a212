"""Short rendered clips on disk, and random crops of them: what the VAE trains on."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from lavatar_jax.data.faces import random_training_frames

WEIGHT_STEP = 1 / 16  # loss weights are stored as bytes in this unit, every 4th pixel
WEIGHT_STRIDE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """Rendered clips and how batches are cut from them.

    A batch is either `crops` short windows of `crop_size` pixels or `full` whole clips; the two kinds
    alternate at random. Crops show the network more people for the same cost, whole clips teach it the
    border, the attention at native size and a longer history. Small batches and many steps learn fastest.
    """

    folder: str = "runs/clips"
    clips: int = 1200
    frames: int = 25  # 1 + 4k; a VAE that never saw long clips drifts off after the longest one it saw
    size: int = 128
    crop_size: int = 64
    crop_frames: int = 5  # 1 + 4k
    crops: int = 4
    full: int = 1
    full_share: float = 0.2  # of the batches
    seed: int = 0


def render_clips(config: ClipsConfig, chunk: int = 20) -> Path:
    """Render what is missing of `config.clips` clips: `video.npy` uint8 [N, T, H, W, 3] and `weight.npy`.

    A chunk of clips depends on its number and the seed only, so an interrupted call goes on where it was.
    """
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)

    @jax.jit
    def render(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        video, weight = random_training_frames(key, chunk, config.frames, config.size)
        weight = weight[:, :, ::WEIGHT_STRIDE, ::WEIGHT_STRIDE, 0] / WEIGHT_STEP
        return jnp.round((video + 1) * 127.5).astype(jnp.uint8), jnp.round(weight).astype(jnp.uint8)

    shape = (config.clips, config.frames, config.size, config.size, 3)
    small = (*shape[:2], config.size // WEIGHT_STRIDE, config.size // WEIGHT_STRIDE)
    video, weight = _array(folder / "video.npy", shape), _array(folder / "weight.npy", small)
    done_file = folder / "done.txt"
    done = int(done_file.read_text()) if done_file.exists() else 0
    for start in track(range(done, config.clips, chunk), description="rendering clips"):
        rendered = render(jax.random.fold_in(jax.random.key(config.seed), start))
        stop = min(start + chunk, config.clips)
        video[start:stop], weight[start:stop] = (np.asarray(x)[: stop - start] for x in rendered)
        video.flush()
        weight.flush()
        temporary = done_file.with_suffix(".tmp")
        temporary.write_text(str(stop))
        os.replace(temporary, done_file)
    return folder


def _array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """The byte array in a file, made when it is missing or of another shape."""
    if path.exists():
        array = np.load(path, mmap_mode="r+")
        if array.shape == shape:
            return array
        path.with_name("done.txt").unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


class ClipSource:
    """Random access to the rendered clips (a grain data source)."""

    def __init__(self, folder: str | Path):
        self.video = np.load(Path(folder) / "video.npy", mmap_mode="r")
        self.weight = np.load(Path(folder) / "weight.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"video": self.video[index], "weight": self.weight[index]}


def random_crop(
    clip: dict[str, np.ndarray], rng: np.random.Generator, *, size: int, frames: int
) -> dict[str, np.ndarray]:
    """A window at a multiple of 4 pixels; three times in four centred near a pixel of high loss weight."""
    first = rng.integers(0, len(clip["video"]) - frames + 1)
    video, weight = (clip[name][first : first + frames] for name in ("video", "weight"))
    limit = (video.shape[1] - size) // WEIGHT_STRIDE
    if rng.random() < 0.75:
        rows, columns = np.nonzero(weight[0] > 1.5 / WEIGHT_STEP)
        i = rng.integers(len(rows))
        centre = np.array([rows[i], columns[i]]) + rng.integers(-3, 4, 2)
        top, left = np.clip(centre - size // WEIGHT_STRIDE // 2, 0, limit)
    else:
        top, left = rng.integers(0, limit + 1, 2)
    length = size // WEIGHT_STRIDE
    weight = weight[:, top : top + length, left : left + length]
    top, left = top * WEIGHT_STRIDE, left * WEIGHT_STRIDE
    video = video[:, top : top + size, left : left + size]
    if rng.random() < 0.5:
        video, weight = video[:, :, ::-1], weight[:, :, ::-1]
    return {"video": np.ascontiguousarray(video), "weight": np.ascontiguousarray(weight)}


def clip_batches(config: ClipsConfig) -> grain.DatasetIterator:
    """Endless batches `{"video": uint8 [B, T, H, W, 3], "weight": uint8 [B, T, H/4, W/4]}` of both kinds."""
    source = ClipSource(config.folder)

    def stream(size: int, frames: int, batch: int, seed: int) -> grain.IterDataset:
        crop = functools.partial(random_crop, size=size, frames=frames)
        clips = grain.MapDataset.source(source).seed(seed).shuffle().repeat(1_000_000)
        return clips.random_map(crop).to_iter_dataset().batch(batch)

    kinds = [
        (stream(config.crop_size, config.crop_frames, config.crops, config.seed), 1.0 - config.full_share),
        (stream(config.size, config.frames, config.full, config.seed + 1), config.full_share),
    ]
    kinds = [(dataset, share) for dataset, share in kinds if share > 0]
    return iter(grain.IterDataset.mix([k for k, _ in kinds], weights=[share for _, share in kinds]))


def unpack(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Video in [-1, 1] and loss weights [B, T, H, W, 1], float32, from a batch of bytes."""
    video = batch["video"].astype(jnp.float32) / 127.5 - 1.0
    weight = batch["weight"].astype(jnp.float32) * WEIGHT_STEP
    weight = jnp.repeat(jnp.repeat(weight, WEIGHT_STRIDE, axis=2), WEIGHT_STRIDE, axis=3)
    return video, weight[..., None]
