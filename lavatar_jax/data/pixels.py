"""Pictures of real videos, which `tools/prepare_data.py --pixels` keeps: what stage 0 learns from."""

from __future__ import annotations

import functools
from pathlib import Path

import grain
import numpy as np

from lavatar_jax.data.batches import EPOCHS, Batch, Batches
from lavatar_jax.data.clips import (
    WEIGHT_STEP,
    WEIGHT_STRIDE,
    ClipsConfig,
    crops_and_clips,
    random_crop,
)
from lavatar_jax.data.record_folder import RecordFolder
from lavatar_jax.errors import UserError

FACE_WEIGHT = 2.0  # of a pixel of the face in the loss; others count 1


class PixelSource(RecordFolder):
    """The pictures of a folder's records, as rows of `ClipSource`: `video` uint8 [T, H, W, 3], `weight` uint8
    [T, H/4, W/4] and `record`.

    `sizes`: the numbers of the records for training by their (T, H, W), in order of first appearance.
    Raises UserError as `RecordFolder`, and where the records keep no pictures.
    """

    def __init__(
        self, folder: str | Path, *, skipped_log: str | Path | None = None, held_out: int = 0
    ) -> None:
        super().__init__(folder, skipped_log=skipped_log, held_out=held_out)
        if not all("pixels" in shapes for shapes in self.shapes):
            raise UserError(
                f"{folder} keeps no pictures for stage 0: prepare the videos with --pixels, in another --out"
            )
        sizes: dict[tuple[int, ...], list[int]] = {}
        for number in self.training:
            sizes.setdefault(self.shapes[number]["pixels"][:3], []).append(number)
        self.sizes = {size: np.array(numbers) for size, numbers in sizes.items()}

    @property
    def sides(self) -> set[int]:
        """Heights and widths of all pictures, in pixels."""
        return {side for shapes in self.shapes for side in shapes["pixels"][1:3]}

    def __getitem__(self, number: int) -> Batch:
        """Raises CorruptRecordError."""
        record = self.record(number)
        video = np.asarray(record["pixels"])
        frames, height, width, _ = video.shape
        grid = (height // WEIGHT_STRIDE, width // WEIGHT_STRIDE)
        weight = np.full((frames, *grid), 1 / WEIGHT_STEP, np.uint8)
        top, left, bottom, right = np.round(np.asarray(record["face"]) * (*grid, *grid)).astype(int)
        weight[:, top:bottom, left:right] = FACE_WEIGHT / WEIGHT_STEP
        return {"video": video, "weight": weight, "record": np.asarray(number, np.int32)}


def pixel_batches(
    source: PixelSource, config: ClipsConfig, *, crops: int, whole: int, workers: int = 0
) -> Batches:
    """`clip_batches` of real videos: `crops` windows, of pictures of any size, or `whole` pictures of one.

    Where a record cannot be read, another one (of the same size) stands in.
    """

    def samples(numbers: np.ndarray, seed: int) -> grain.MapDataset:
        read = functools.partial(_read, source, numbers)
        return grain.MapDataset.source(numbers).seed(seed).shuffle().repeat(EPOCHS).map(read)

    everything = np.concatenate(list(source.sizes.values()))
    crop = functools.partial(
        random_crop, size=(config.crop_size, config.crop_size), frames=config.crop_frames
    )
    kinds = [(samples(everything, config.seed).random_map(crop), crops, 1.0 - config.full_share)]
    for i, ((frames, *size), numbers) in enumerate(source.sizes.items(), start=1):
        flip = functools.partial(random_crop, size=(size[0], size[1]), frames=frames)
        share = config.full_share * len(numbers) / len(everything)
        kinds.append((samples(numbers, config.seed + i).random_map(flip), whole, share))
    return crops_and_clips(kinds, workers=workers)


def _read(source: PixelSource, peers: np.ndarray, number: int) -> Batch:
    return source.read_or_replace(int(number), peers, source.__getitem__)
