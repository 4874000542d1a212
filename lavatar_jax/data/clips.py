"""Short rendered clips on disk, and random crops of them: what the VAE trains on."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from lavatar_jax.data.batches import EPOCHS, Batches, stacked
from lavatar_jax.data.faces import random_training_frames
from lavatar_jax.data.made_with import check_rendering, write_note
from lavatar_jax.data.shards import RENDERED
from lavatar_jax.files import write_text

WEIGHT_STEP = 1 / 16  # loss weights are stored as bytes in this unit, every 4th pixel
WEIGHT_STRIDE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """Clips and how batches are cut from them.

    `clips` of `frames` and `size` are rendered into `folder`. A folder of real videos (`tools/prepare_data.py
    --pixels`), and any with `clips` 0, is only read: whole clips are then what its records keep.
    A batch is either short windows of `crop_size` pixels (`--train.batch` of them) or whole clips (as few as
    the devices can share); the two kinds take turns. Crops show the network more people for the same cost,
    whole clips teach it the border, the attention at native size and a longer history. Small batches and many
    steps learn fastest.
    """

    folder: str = "runs/clips"
    clips: int = 1200
    frames: int = 25  # 1 + 4k; a VAE that never saw long clips drifts off after the longest one it saw
    size: int = 128
    crop_size: int = 64
    crop_frames: int = 5  # 1 + 4k
    full_share: float = 0.2  # of the batches
    seed: int = 0


def render_clips(config: ClipsConfig, chunk: int = 20) -> Path:
    """Render what is missing of `config.clips` clips: `video.npy` uint8 [N, T, H, W, 3] and `weight.npy`.

    A chunk of clips depends on its number and what `rendered.json` notes only, so an interrupted call goes on
    where it was. Clips without that note, of an earlier version, are rendered again. Raises UserError where
    the folder's clips are others.
    """
    folder = Path(config.folder)
    rendering = {name: getattr(config, name) for name in ("frames", "size", "seed")}
    check_rendering(folder, rendering)
    side = config.size // WEIGHT_STRIDE
    kept = ClipArrays(
        folder,
        config.clips,
        {
            "video": ((config.frames, config.size, config.size, 3), np.uint8),
            "weight": ((config.frames, side, side), np.uint8),
        },
    )
    if not (folder / RENDERED).is_file():
        if kept.done:
            print(f"note: {folder} has clips of an unknown seed: they are rendered again", file=sys.stderr)
        kept.forget()
        write_note(folder / RENDERED, rendering)

    @jax.jit
    def render(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        video, weight = random_training_frames(key, chunk, config.frames, config.size)
        weight = weight[:, :, ::WEIGHT_STRIDE, ::WEIGHT_STRIDE, 0] / WEIGHT_STEP
        return jnp.round((video + 1) * 127.5).astype(jnp.uint8), jnp.round(weight).astype(jnp.uint8)

    for start in track(range(kept.done, config.clips, chunk), description="rendering clips"):
        rendered = render(jax.random.fold_in(jax.random.key(config.seed), start))
        stop = min(start + chunk, config.clips)
        for name, values in zip(("video", "weight"), rendered, strict=True):
            kept.arrays[name][start:stop] = np.asarray(values)[: stop - start]
        kept.finish(stop)
    return folder


class ClipArrays:
    """Arrays in a folder, one row for each clip, that are filled in order by calls that may be killed.

    `sizes`: shape of a row and type, by name. `done`: rows that are finished. A file of another shape or
    type is made anew, and all of them filled again.
    """

    def __init__(
        self, folder: Path, rows: int, sizes: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "done.txt"
        self.arrays: dict[str, np.memmap] = {}
        for name, (shape, dtype) in sizes.items():
            path, whole = folder / f"{name}.npy", (rows, *shape)
            if path.exists():
                found = np.load(path, mmap_mode="r+")
                if (found.shape, found.dtype) == (whole, dtype):
                    self.arrays[name] = found
                    continue
            self._file.unlink(missing_ok=True)
            self.arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=whole)
        self.done = int(self._file.read_text()) if self._file.exists() else 0

    def forget(self) -> None:
        """No row is filled."""
        self._file.unlink(missing_ok=True)
        self.done = 0

    def finish(self, rows: int) -> None:
        """Everything before row `rows` is filled."""
        for array in self.arrays.values():
            array.flush()
        write_text(self._file, str(rows))
        self.done = rows


class ClipSource:
    """Random access to rows of the arrays in a folder of `ClipArrays` (a grain data source), as dicts of the
    arrays and `record`, the number of the row.

    Worker processes open the files anew.
    """

    def __init__(
        self,
        folder: str | Path,
        names: tuple[str, ...] = ("video", "weight"),
        clips: slice = slice(None),
    ) -> None:
        self._opened = (folder, names, clips)
        whole = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r") for name in names}
        self.arrays = {name: array[clips] for name, array in whole.items()}
        self._numbers = np.arange(len(whole["video"]), dtype=np.int32)[clips]

    def __reduce__(self) -> tuple[type[ClipSource], tuple[object, ...]]:
        return type(self), self._opened

    def __len__(self) -> int:
        return len(self.arrays["video"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()} | {"record": self._numbers[index]}


def random_crop(
    clip: dict[str, np.ndarray], rng: np.random.Generator, *, size: tuple[int, int], frames: int
) -> dict[str, np.ndarray]:
    """A window of `size` (rows, columns), multiples of 4 pixels, at such a place; three times in four centred
    near a pixel of high loss weight, if there is one."""
    first = rng.integers(0, len(clip["video"]) - frames + 1)
    video, weight = (clip[name][first : first + frames] for name in ("video", "weight"))
    window = np.array(size) // WEIGHT_STRIDE
    limit = weight.shape[1:] - window
    near = np.argwhere(weight[0] > 1.5 / WEIGHT_STEP)
    if rng.random() < 0.75 and len(near):
        centre = near[rng.integers(len(near))] + rng.integers(-3, 4, 2)
        corner = np.clip(centre - window // 2, 0, limit)
    else:
        corner = rng.integers(0, limit + 1)

    def cut(array: np.ndarray, scale: int) -> np.ndarray:
        (top, left), (bottom, right) = scale * corner, scale * (corner + window)
        return array[:, top:bottom, left:right]

    video, weight = cut(video, WEIGHT_STRIDE), cut(weight, 1)
    if rng.random() < 0.5:
        video, weight = video[:, :, ::-1], weight[:, :, ::-1]
    arrays = {"video": np.ascontiguousarray(video), "weight": np.ascontiguousarray(weight)}
    return arrays | {"record": clip["record"]}


def clip_batches(config: ClipsConfig, *, crops: int, whole: int, workers: int = 0) -> Batches:
    """Endless batches of both kinds, `crops` windows or `whole` clips: `video` uint8 [B, T, H, W, 3],
    `weight` uint8 [B, T, H/4, W/4], and `record` int32 [B], the numbers of the clips."""
    source = ClipSource(config.folder)

    def samples(size: int, frames: int, seed: int) -> grain.MapDataset:
        crop = functools.partial(random_crop, size=(size, size), frames=frames)
        return grain.MapDataset.source(source).seed(seed).shuffle().repeat(EPOCHS).random_map(crop)

    kinds = [
        (samples(config.crop_size, config.crop_frames, config.seed), crops, 1.0 - config.full_share),
        (samples(config.size, config.frames, config.seed + 1), whole, config.full_share),
    ]
    return crops_and_clips(kinds, workers=workers)


def crops_and_clips(kinds: Sequence[tuple[grain.MapDataset, int, float]], *, workers: int) -> Batches:
    """Batches of several kinds that take turns: (samples, how many to a batch, share of the batches)."""
    kinds = [kind for kind in kinds if kind[2] > 0]

    def order(part: int, parts: int) -> grain.MapDataset:
        batches = [stacked(samples, batch, part, parts) for samples, batch, _ in kinds]
        return grain.MapDataset.mix(batches, weights=[share for *_, share in kinds])

    return Batches(order, workers=workers)


def unpack(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Video in [-1, 1] and loss weights [B, T, H, W, 1], float32, from a batch of bytes."""
    video = batch["video"].astype(jnp.float32) / 127.5 - 1.0
    weight = batch["weight"].astype(jnp.float32) * WEIGHT_STEP
    weight = jnp.repeat(jnp.repeat(weight, WEIGHT_STRIDE, axis=2), WEIGHT_STRIDE, axis=3)
    return video, weight[..., None]
