"""Random access to a folder of records that `shards.ShardWriter` made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_record.python import array_record_module

from lavatar_jax.data.records import Record, decode_record, shapes
from lavatar_jax.data.shards import read_dataset, read_manifest
from lavatar_jax.data.skipped import SkippedLog
from lavatar_jax.errors import UserError

T = TypeVar("T")
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
ATTEMPTS = 64  # records to try in the place of one that cannot be read


class CorruptRecordError(Exception):
    """A record that is in the manifest and cannot be read."""


class RecordFolder:
    """The records of a folder by number, as they were written; can be sent to worker processes.

    `skipped_log`: a file that gets a line for every record that cannot be read (`skipped.SkippedLog`).
    `held_out`: so many records, the last ones, are not for training; as an attribute, their numbers. Of real
    videos, the other records of theirs are not either (`training`): they show the same person.
    Raises UserError where the folder is missing, foreign, unfinished, or without records.
    """

    def __init__(
        self, folder: str | Path, *, skipped_log: str | Path | None = None, held_out: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.dataset = read_dataset(folder)
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
        self.held_out: Sequence[int] = range(len(rows) - held_out, len(rows))
        self.training = _training_records(rows, held_out)
        if not self.training:
            raise UserError(
                f"{folder}: all {len(rows)} records are of the videos of the last {held_out}, which are held "
                "out of training (--samples.records): hold out fewer or none, or prepare more videos"
            )
        self.shapes = [_tuples(row["shapes"]) for row in rows]
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
        return f"{type(self).__name__}({str(self.folder)!r}, records={len(self)})"

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
            if _tuples(shapes(record)) != self.shapes[number]:
                raise ValueError("its shapes are not those of the manifest")
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise CorruptRecordError(f"{self.shards[shard]}, offset {offset}: {reason}") from None
        return record

    def read_or_replace(self, number: int, peers: np.ndarray, read: Callable[[int], T]) -> T:
        """`read(number)`, or of one of `peers` where that raises CorruptRecordError, which is noted.

        Which one depends on `number` alone. Raises UserError where nearly all of them are unreadable.
        """
        candidate = number
        # Drawn by the number of the bad record, not its neighbour: a whole lost shard must not make one
        # record stand in a hundred times.
        random = np.random.default_rng([number, 77])
        for _ in range(ATTEMPTS):
            try:
                return read(candidate)
            except CorruptRecordError as error:
                self.skipped_log.add(self.ids[candidate], str(error))
            candidate = int(peers[random.integers(len(peers))])
        raise UserError(
            f"{self.folder}: nearly all of {len(peers)} records are unreadable, such as {self.ids[number]}; "
            "copy the shards again or prepare the data again"
        )

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                path = self.folder / self.shards[shard]
                if not path.is_file():
                    raise FileNotFoundError(f"the shard {path.name} is missing")
                self._readers[shard] = array_record_module.ArrayRecordReader(str(path), READER_OPTIONS)
            return self._readers[shard]


def _training_records(rows: Sequence[Mapping[str, Any]], held_out: int) -> list[int]:
    """The numbers of all records but the last `held_out` and those of the same videos."""
    training = len(rows) - held_out
    videos = {row.get("video") for row in rows[training:]} - {None}  # rendered records have none
    return [number for number in range(training) if rows[number].get("video") not in videos]


def _tuples(sizes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in sizes.items()}
