"""Batches of training records, in an endless, exactly resumable order.

Batch number k is a pure function of (folder, seed, k): which bucket of shapes it comes from, which records,
and what stands in for one that cannot be read. So the order does not depend on worker processes, on how many
machines share a batch, or on when a run was interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import grain
import numpy as np

from lavatar_jax.data.batches import EPOCHS, Batch, Batches, rows_of_part
from lavatar_jax.data.negative_prompt import read_negative
from lavatar_jax.data.record_folder import RecordFolder
from lavatar_jax.errors import UserError
from lavatar_jax.models.words import encode_words

NORMALISED = ("latent", "reference", "motion", "pose")
UNUSED = ("spread", "pixels", "face")  # what the transformer does not train on
UNBATCHED = ("text", *UNUSED)  # not part of a bucket's shapes: texts are padded to one length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Records whose arrays have the same shapes."""

    shapes: dict[str, tuple[int, ...]]
    records: np.ndarray  # int64 [n], numbers in the manifest

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        frames, height, width, _ = self.shapes["latent"]
        return frames, height, width


class ShardSource(RecordFolder):
    """The records of a folder as training sees them.

    `text_len`, `text_dim`: of the DiT; the shape of the text states in a batch. Records without states of
    their own get them from the words of their captions.
    `negative`: with the folder's negative prompt (`negative_prompt`) in each row.
    `skipped_log`, `held_out`: as of `RecordFolder`; no bucket has what is held out, so that no batch has it.
    Raises UserError as `RecordFolder`, and where the folder has no such prompt.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        text_len: int,
        text_dim: int,
        skipped_log: str | Path | None = None,
        held_out: int = 0,
        negative: bool = False,
    ) -> None:
        super().__init__(folder, skipped_log=skipped_log, held_out=held_out)
        self.text_shape = (text_len, text_dim)
        self._negative = self._read_negative() if negative else None
        self.mean, self.std = (np.array(x, np.float32) for x in (self.dataset.mean, self.dataset.std))
        self.buckets = _buckets([_batched(sizes) for sizes in self.shapes], self.training)
        self._bucket = np.zeros(len(self), np.int64)  # of held-out records it is not asked
        for i, bucket in enumerate(self.buckets):
            self._bucket[bucket.records] = i

    def __getitem__(self, number: int) -> Batch:
        """A record as training sees it: one row of a batch (see `record_batches`).

        Raises CorruptRecordError.
        """
        record = self.record(number)
        row: Batch = {
            name: value.astype(np.float32)
            for name, value in record.items()
            if not isinstance(value, str) and name not in UNUSED
        }
        for name in NORMALISED:
            if name in row:
                row[name] = (row[name] - self.mean) / self.std
        row["audio"] = row["audio"][None]  # one speaker
        size = row["latent"].shape[1:3]
        row["mouth"] = row["mouth"] / np.float32(255) if "mouth" in row else np.ones(size, np.float32)
        row["text"] = self._text(str(record["caption"]), row.get("text"))
        if self._negative is not None:
            row["negative_text"] = self._negative
        return {**row, "record": np.asarray(number, np.int32)}

    def read_batch(self, numbers: np.ndarray) -> Batch:
        """Rows of one bucket, stacked. Where a record cannot be read, another one of the bucket stands in."""
        peers = [self.buckets[self._bucket[number]].records for number in numbers]
        rows = [
            self.read_or_replace(int(number), of, self.__getitem__)
            for number, of in zip(numbers, peers, strict=True)
        ]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _read_negative(self) -> np.ndarray:
        found = read_negative(self.folder)
        if found is None:
            raise UserError(
                f"{self.folder} has no negative prompt: run tools/prepare_data.py on it again, with the same "
                "--model (a converted one), or choose --score.without-text zeros"
            )
        return self._pad(found[1].astype(np.float32))

    def _text(self, caption: str, states: np.ndarray | None) -> np.ndarray:
        return encode_words(caption, *self.text_shape) if states is None else self._pad(states)

    def _pad(self, states: np.ndarray) -> np.ndarray:
        length, dim = self.text_shape
        if states.shape[0] > length or states.shape[1] != dim:
            raise UserError(
                f"{self.folder} has text states {list(states.shape)}, the model takes {length} of {dim}; "
                "prepare the data with the text encoder of this model"
            )
        return np.pad(states, ((0, length - len(states)), (0, 0)))


def _buckets(sizes: Sequence[dict[str, tuple[int, ...]]], numbers: Sequence[int]) -> list[Bucket]:
    """Records by their shapes, in order of first appearance."""
    groups: dict[tuple, list[int]] = {}
    for number in numbers:
        groups.setdefault(tuple(sorted(sizes[number].items())), []).append(number)
    return [Bucket(shapes=dict(key), records=np.array(records)) for key, records in groups.items()]


def _batched(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes that must be equal in a batch."""
    return {name: shape for name, shape in sizes.items() if name not in UNBATCHED}


def record_batches(
    source: ShardSource, *, batch: int, seed: int, workers: int = 0, prefetch: int = 4
) -> Batches:
    """Endless shuffled batches: dicts of arrays, float32 but for `record`; a batch has one latent shape.

        latent [B, F, h, w, Z] and reference [B, 1, h, w, Z], normalised by the folder's mean and std
        audio [B, 1, L, A, T]   text [B, S, E], zeros after the caption's end   negative_text alike, if wanted
        mouth [B, h, w] in 0 .. 1, ones where it is not known
        record [B] int32: numbers in the manifest (`source.ids` has the names)
        openness [B, T], motion [B, Fm, h, w, Z] and pose [B, F, h, w, Z] where the bucket's records have them

    Buckets take turns in proportion to their sizes, on all processes alike. Every record comes once an epoch.
    `batch`: records of a step over all processes; `workers`, `prefetch` and UserError as for `Batches`.
    """

    def order(part: int, parts: int) -> grain.MapDataset:
        rows = rows_of_part(batch, part, parts)
        numbers = [
            grain.MapDataset.source(bucket.records).seed(seed + i).shuffle().repeat(EPOCHS).batch(batch)
            for i, bucket in enumerate(source.buckets)
        ]
        if len(numbers) > 1:
            whole = grain.MapDataset.mix(numbers, weights=[len(bucket.records) for bucket in source.buckets])
        else:
            whole = numbers[0]
        return whole.map(lambda numbers: source.read_batch(numbers[rows]))

    return Batches(order, workers=workers, prefetch=prefetch)
