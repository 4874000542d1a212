"""Write arrays of a checkpoint layer by layer: a few chunks are in memory, whatever the model's size."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lavatar_jax.checkpoints.journal import Journal
from lavatar_jax.checkpoints.manifest import Stored, bytes_of
from lavatar_jax.checkpoints.orbax_store import chunks_of, create_leaf

BLOCK_BYTES = 2**24  # of a layer that are cast at a time: bounds the copies made on the way
SYNC_BYTES = 2**20  # arrays below this are not synced to disk one by one
TILE = 512  # numbers

Advance = Callable[[int], None]


class Layer(Protocol):
    """The numbers of one layer, of which rows are asked for in order."""

    def rows(self, rows: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Output:
    """An array to be written. `layers[i]()` reads layer i, or all of it where it is not `stacked`."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    layers: tuple[Callable[[], Layer], ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_output(
    folder: Path, output: Output, journal: Journal, name: str, advance: Advance = lambda count: None
) -> Stored:
    """Write one array into the checkpoint `folder`; chunks that the journal has under `name` are kept.

    Kept chunks are read again for the hash of the whole, and that they are what they were; if they are not,
    the array is written anew. Only a large array that is finished is not read again: it was synced to disk,
    for which small ones do not wait. `advance` is told the bytes that are finished.
    """
    place = folder / output.path
    place.mkdir(parents=True, exist_ok=True)
    chunks = chunks_of(output.shape, output.dtype.itemsize, stacked=output.stacked)
    record = journal.done.get(name, {"chunks": 0, "sha256": ""})
    sync = output.nbytes >= SYNC_BYTES
    if record["chunks"] == chunks.count and sync:
        advance(output.nbytes)
        return _stored(output, record["sha256"])
    array = create_leaf(place, chunks, output.dtype, sync=sync)
    boxes = list(chunks.boxes())
    done = record["chunks"]
    digest = _hash(array, boxes[:done])
    if digest is None or (done and digest.hexdigest() != record["sha256"]):
        digest, done = hashlib.sha256(), 0
    advance(sum(_nbytes(output, box) for box in boxes[:done]))
    reader = _Reader(output)
    writing: tuple[Any, dict[str, Any], int] | None = None

    def finish(future: Any, record: dict[str, Any], nbytes: int) -> None:
        future.result()
        journal.record(name, record, sync=sync)
        advance(nbytes)

    for index, box in enumerate(boxes[done:], done + 1):
        numbers = reader.read(box)
        digest.update(bytes_of(numbers))
        if writing is not None:
            finish(*writing)  # the chunk before was written while this one was read
        future = array[box].write(numbers, can_reference_source_data_indefinitely=True)
        writing = future, {"chunks": index, "sha256": digest.hexdigest()}, numbers.nbytes
    if writing is not None:
        finish(*writing)
    return _stored(output, digest.hexdigest())


def _hash(array: Any, boxes: Sequence[tuple[slice, ...]]) -> Any:
    """Hash of chunks that were written before; None if they cannot be read."""
    digest = hashlib.sha256()
    try:
        for box in boxes:
            digest.update(bytes_of(np.ascontiguousarray(array[box].read().result())))
    except ValueError:
        return None
    return digest


class _Reader:
    """Puts chunks together from layers; holds one layer, for the next chunk may be the rest of it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._index: int | None = None
        self._layer: Any = None

    def read(self, box: tuple[slice, ...]) -> np.ndarray:
        output = self._output
        numbers = np.empty([cut.stop - cut.start for cut in box], output.dtype)
        if not output.stacked:
            self._fill(numbers, 0, box)
            return numbers
        for index in range(box[0].start, box[0].stop):
            self._fill(numbers[index - box[0].start, ...], index, box[1:])
        return numbers

    def _fill(self, target: np.ndarray, index: int, box: tuple[slice, ...]) -> None:
        if index != self._index:
            self._layer = None  # before the next one is read
            self._layer, self._index = self._output.layers[index](), index
        if not box:
            target[...] = self._layer.rows(slice(0, 1))
            return
        first, count = box[0].start, len(target)
        step = max(BLOCK_BYTES * count // max(target.nbytes, 1), 1)
        for start in range(0, count, step):
            stop = min(start + step, count)
            copy_bits(target[start:stop], self._layer.rows(slice(first + start, first + stop)))


def copy_bits(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` of one dtype: as integers and in tiles, which is faster where it transposes."""
    target, source = bits_of(target), bits_of(source)
    for start in range(0, target.shape[-1], TILE):
        target[..., start : start + TILE] = source[..., start : start + TILE]


def bits_of(array: np.ndarray) -> np.ndarray:
    """The same numbers as unsigned integers; numpy handles those faster than 8 and 16 bit floats."""
    return array.view(f"u{array.itemsize}")


def _stored(output: Output, sha256: str) -> Stored:
    return Stored(shape=output.shape, dtype=output.dtype.name, sha256=sha256)


def _nbytes(output: Output, box: tuple[slice, ...]) -> int:
    return int(np.prod([cut.stop - cut.start for cut in box], dtype=np.int64)) * output.dtype.itemsize
