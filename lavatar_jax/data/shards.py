"""A folder of records: ArrayRecord shards, a manifest with a line for every record, and what holds for all.

    shard-00000.array_record  records (zstd, each with a checksum, group_size 1 for random access)
    manifest.jsonl            {"id", "shard", "offset", "frames", "shapes", "caption", ...} as written
    dataset.json              written last: statistics and origin of the latents; without it, unfinished

A shard gets its name after its lines are in the manifest, so a line counts if and only if its shard exists:
whatever kills the writer, the next one drops the other lines and goes on behind the last whole shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from array_record.python import array_record_module

from lavatar_jax.data.records import Record, decode_record, encode_record, shapes
from lavatar_jax.errors import UserError
from lavatar_jax.files import lock_folder, write_text

OPTIONS = "group_size:1"
MANIFEST, DATASET = "manifest.jsonl", "dataset.json"
RENDERED, PREPARED = "rendered.json", "settings.json"  # how rendered clips were made, or those of real videos
FORMAT = 1  # of dataset.json; a reader of another number refuses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What holds for all records of a folder."""

    records: int
    mean: tuple[float, ...]  # of latents, per channel; training sees (latent - mean) / std
    std: tuple[float, ...]
    encoder: dict[str, Any]  # what made the latents and features, in words and numbers
    format: int = FORMAT


def read_dataset(folder: str | Path) -> Dataset:
    """Raises UserError where `folder` is no finished folder of records."""
    path = Path(folder) / DATASET
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of training records; prepare the data first")
    if not path.is_file():
        begun = (path.parent / MANIFEST).is_file()
        hint = "its preparation was not finished; run it again" if begun else "prepare the data first"
        raise UserError(f"{folder} is not a folder of training records: {DATASET} is missing; {hint}")
    try:
        values = json.loads(path.read_text())
        dataset = Dataset(**{field.name: values[field.name] for field in dataclasses.fields(Dataset)})
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged or of another kind; prepare the data again") from None
    if dataset.format != FORMAT:
        raise UserError(
            f"{path} has format {dataset.format}, this version reads {FORMAT}; prepare the data again"
        )
    return dataset


def read_manifest(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of the manifest in order; a damaged last line (an interrupted writer's) is left out.

    Raises UserError where another line is damaged.
    """
    path = Path(folder) / MANIFEST
    rows: list[dict[str, Any]] = []
    # Not `splitlines`: names may hold what Unicode takes for an end of line.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(
                {**row, "id": str(row["id"]), "shard": str(row["shard"]), "offset": int(row["offset"])}
            )
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}, line {number} is damaged; prepare the data again") from None
    return rows


def stored_records(folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """The records of lines of a manifest, one after the other. Raises UserError where one is damaged."""
    path, reader = None, None
    try:
        for row in rows:
            if path != Path(folder) / row["shard"]:
                path = Path(folder) / row["shard"]
                reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
            assert reader is not None
            yield decode_record(reader.read([row["offset"]])[0])
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data again") from None


class ShardWriter:
    """Appends records to a folder; going on after an interruption is the same call again.

        with ShardWriter(folder) as writer:
            for ... if id not in writer.ids:
                writer.write(record, fps=25, ...)
            writer.finish(mean=..., std=..., encoder={...})

    Leaving the `with`, also by an error or Ctrl-C, keeps what was written; kill -9 loses the open shard.
    Raises UserError where the folder cannot be written, or another process writes to it.
    """

    def __init__(self, folder: str | Path, *, shard_records: int = 256) -> None:
        self.folder = Path(folder)
        self._limit = shard_records
        self._lock = lock_folder(self.folder)
        rows = read_manifest(self.folder)
        self.rows = [row for row in rows if (self.folder / row["shard"]).is_file()]
        self.ids = {row["id"] for row in self.rows}
        if len(self.rows) < len(rows):  # a shard was lost
            (self.folder / DATASET).unlink(missing_ok=True)  # unfinished again
        self._manifest_bytes = 0
        if (self.folder / MANIFEST).is_file():
            self._write_manifest()
        for part in self.folder.glob(".shard-*.part"):
            part.unlink()
        # Shards of other writers may have other names: these cannot be written over.
        numbers = (re.fullmatch(r"shard-(\d+)\.array_record", row["shard"]) for row in self.rows)
        self._number = 1 + max((int(match[1]) for match in numbers if match), default=-1)
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self._open_rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.rows) + len(self._open_rows)

    @property
    def unsaved(self) -> int:
        """Records that a kill would lose."""
        return len(self._open_rows)

    @property
    def _shard(self) -> Path:
        return self.folder / f"shard-{self._number:05d}.array_record"

    @property
    def _part(self) -> Path:
        return self.folder / f".{self._shard.name}.part"

    def write(self, record: Mapping[str, np.ndarray | str], **facts: Any) -> None:
        """Append a record; `facts` join its line of the manifest. Raises ValueError as `encode_record`."""
        identifier = str(record["id"])
        if identifier in self.ids:
            raise ValueError(f"{self.folder} has a record {identifier} already")
        data = encode_record(record)
        if self._writer is None:
            self.flush()  # of a shard whose completion failed
        with _write_errors(self.folder):
            if self._writer is None:
                (self.folder / DATASET).unlink(missing_ok=True)  # unfinished again
                self._writer = array_record_module.ArrayRecordWriter(str(self._part), OPTIONS)
            self._writer.write(data)
        size = shapes(record)
        self._open_rows.append(
            {
                "id": identifier,
                "shard": self._shard.name,
                "offset": len(self._open_rows),
                "frames": size["audio"][-1],
                "shapes": size,
                "caption": record["caption"],
                **facts,
            }
        )
        self.ids.add(identifier)
        if len(self._open_rows) >= self._limit:
            self.flush()

    def forget(self, what: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the records of complete shards whose lines of the manifest are `what`; ids are free again.

        Their bytes stay in the shards, where nothing finds them.
        """
        with _write_errors(self.folder):
            (self.folder / DATASET).unlink(missing_ok=True)  # unfinished again
        self.ids -= {row["id"] for row in self.rows if what(row)}
        self.rows = [row for row in self.rows if not what(row)]
        self._write_manifest()

    def flush(self) -> None:
        """Complete the open shard. After an error or Ctrl-C in it the next call goes on with it."""
        if not self._open_rows:
            return
        with _write_errors(self.folder):
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            (self.folder / MANIFEST).touch()
            with open(self.folder / MANIFEST, "r+b") as manifest:
                manifest.seek(self._manifest_bytes)
                manifest.truncate()  # what a flush that failed has left
                manifest.write("".join(map(_line, self._open_rows)).encode())
                manifest.flush()
                os.fsync(manifest.fileno())
                size = manifest.tell()
            if self._part.exists():  # else a Ctrl-C came right after this
                os.replace(self._part, self._shard)
        self.rows += self._open_rows
        self._open_rows = []
        self._manifest_bytes = size
        self._number += 1

    def _write_manifest(self) -> None:
        """Of the records in complete shards."""
        text = "".join(map(_line, self.rows))
        write_text(self.folder / MANIFEST, text)
        self._manifest_bytes = len(text.encode())

    def finish(self, *, mean: np.ndarray, std: np.ndarray, encoder: Mapping[str, Any]) -> Dataset:
        """Complete the folder: `dataset.json` says that all is there."""
        self.flush()
        dataset = Dataset(
            records=len(self),
            mean=tuple(map(float, mean)),
            std=tuple(map(float, std)),
            encoder=dict(encoder),
        )
        write_text(self.folder / DATASET, json.dumps(dataclasses.asdict(dataset), indent=1) + "\n")
        return dataset

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
            else:
                with contextlib.suppress(UserError):  # the first error is the one to tell
                    self.flush()
        finally:
            self._lock.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free space or write elsewhere") from None
