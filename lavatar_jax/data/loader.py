"""Batches of training records: random access to shards, and an endless, exactly resumable order over them.

Batch number k is a pure function of (folder, seed, k): which bucket of shapes it comes from, which records,
and what stands in for one that cannot be read. So the order does not depend on worker processes, on how many
machines share a batch, or on when a run was interrupted.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from lavatar_jax.data.batches import EPOCHS, Batch, Batches, rows_of_part
from lavatar_jax.data.negative_prompt import read_negative
from lavatar_jax.data.records import Record, decode_record, shapes
from lavatar_jax.data.shards import read_dataset, read_manifest
from lavatar_jax.data.skipped import SkippedLog
from lavatar_jax.errors import UserError
from lavatar_jax.models.words import encode_words

NORMALISED = ("latent", "reference", "motion", "pose")
UNBATCHED = ("text", "spread")  # padded to one length, or not for training: not part of a bucket's shapes
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
ATTEMPTS = 64  # records to try in the place of one that cannot be read


class CorruptRecordError(Exception):
    """A record that is in the manifest and cannot be read."""


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


class ShardSource:
    """Random access to a folder that `shards.ShardWriter` made; can be sent to worker processes.

    `text_len`, `text_dim`: of the DiT; the shape of the text states in a batch. Records without states of
    their own get them from the words of their captions.
    `skipped_log`: a file that gets a line for every record that cannot be read (`skipped.SkippedLog`).
    `held_out`: so many records, the last ones, are in no bucket, so that no batch has them; as an attribute,
    their numbers. Of real videos, the other records of theirs are left out too: they show the same person.
    `negative`: with the folder's negative prompt (`negative_prompt`) in each row.
    Raises UserError where the folder is missing, foreign, unfinished, or without records or that prompt.
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
        self.folder = Path(folder)
        self.dataset = read_dataset(folder)
        self.text_shape = (text_len, text_dim)
        self._negative = self._read_negative() if negative else None
        self.mean, self.std = (np.array(x, np.float32) for x in (self.dataset.mean, self.dataset.std))
        rows = read_manifest(folder)
        if not rows:
            raise UserError(f"{folder} has no training records; see its report, and prepare the data again")
        if len(rows) != self.dataset.records:
            raise UserError(
                f"{folder}: the manifest names {len(rows)} records, dataset.json {self.dataset.records}; "
                "copy both files again or prepare the data again"
            )
        self.ids = [row["id"] for row in rows]
        self.captions = [str(row.get("caption", "")) for row in rows]
        self.shards = sorted({row["shard"] for row in rows})
        if not any((self.folder / shard).is_file() for shard in self.shards):
            raise UserError(
                f"{folder}: none of its {len(self.shards)} shards is there; copy them beside the manifest"
            )
        number = {shard: i for i, shard in enumerate(self.shards)}
        self._place = [(number[row["shard"]], row["offset"]) for row in rows]
        if not 0 <= held_out < len(rows):
            raise UserError(f"{folder} has {len(rows)} records: {held_out} cannot be held out of training")
        self.held_out = range(len(rows) - held_out, len(rows))
        self._shapes = [_batched(row["shapes"]) for row in rows]
        self.buckets = _buckets(self._shapes, _training_records(rows, held_out))
        if not self.buckets:
            raise UserError(
                f"{folder}: all {len(rows)} records are of the videos of the last {held_out}, which are held "
                "out of training (--samples.records): hold out fewer or none, or prepare more videos"
            )
        self._bucket = np.zeros(len(rows), np.int64)  # of held-out records it is not asked
        for i, bucket in enumerate(self.buckets):
            self._bucket[bucket.records] = i
        self.skipped_log = SkippedLog(skipped_log)
        self._reset()

    def _reset(self) -> None:
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset()

    def __repr__(self) -> str:
        return f"ShardSource({str(self.folder)!r}, records={len(self)})"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def skipped(self) -> dict[str, str]:
        """Why a record could not be read, by its id: those that were asked for so far.

        With worker processes, what they met is known only through `skipped_log`.
        """
        return self.skipped_log.read()

    def record(self, number: int) -> Record:
        """A record as it was written. Raises CorruptRecordError."""
        shard, offset = self._place[number]
        try:
            record = decode_record(self._reader(shard).read([offset])[0])
            if record["id"] != self.ids[number]:
                raise ValueError(f"holds {record['id']}, not {self.ids[number]} as the manifest says")
            if _batched(shapes(record)) != self._shapes[number]:
                raise ValueError("its shapes are not those of the manifest")
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise CorruptRecordError(f"{self.shards[shard]}, offset {offset}: {reason}") from None
        return record

    def __getitem__(self, number: int) -> Batch:
        """A record as training sees it: one row of a batch (see `record_batches`).

        Raises CorruptRecordError.
        """
        record = self.record(number)
        arrays = {name: value for name, value in record.items() if not isinstance(value, str)}
        row: Batch = {name: value.astype(np.float32) for name, value in arrays.items() if name != "spread"}
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
        rows = [self._read(int(number)) for number in numbers]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _read(self, number: int) -> Batch:
        candidate = number
        peers = self.buckets[self._bucket[number]].records
        # Drawn by the number of the bad record, not its neighbour: a whole lost shard must not make one
        # record stand in a hundred times.
        random = np.random.default_rng([number, 77])
        for _ in range(ATTEMPTS):
            try:
                return self[candidate]
            except CorruptRecordError as error:
                self.skipped_log.add(self.ids[candidate], str(error))
            candidate = int(peers[random.integers(len(peers))])
        size = self.buckets[self._bucket[number]].latent_size
        raise UserError(
            f"{self.folder}: nearly all records of latent size {size} are unreadable, such as "
            f"{self.ids[number]}; copy the shards again or prepare the data again"
        )

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                path = self.folder / self.shards[shard]
                if not path.is_file():
                    raise FileNotFoundError(f"the shard {path.name} is missing")
                self._readers[shard] = array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)
            return self._readers[shard]

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


def _training_records(rows: Sequence[Mapping[str, Any]], held_out: int) -> list[int]:
    """The numbers of all records but the last `held_out` and those of the same videos."""
    training = len(rows) - held_out
    videos = {row.get("video") for row in rows[training:]} - {None}  # rendered records have none
    return [number for number in range(training) if rows[number].get("video") not in videos]


def _buckets(sizes: Sequence[dict[str, tuple[int, ...]]], numbers: Sequence[int]) -> list[Bucket]:
    """Records by their shapes, in order of first appearance."""
    groups: dict[tuple, list[int]] = {}
    for number in numbers:
        groups.setdefault(tuple(sorted(sizes[number].items())), []).append(number)
    return [Bucket(shapes=dict(key), records=np.array(records)) for key, records in groups.items()]


def _batched(sizes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The shapes that must be equal in a batch."""
    return {name: tuple(shape) for name, shape in sizes.items() if name not in UNBATCHED}


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
