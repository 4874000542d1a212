"""Tensors of PyTorch checkpoints on disk: names, shapes and dtypes at once, numbers one tensor at a time.

safetensors are read here, without torch, through plain file reads: pages of a mapped file would count as
our memory for as long as the file is open. What is wrong with a file is found when it is opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from lavatar_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {  # safetensors' names
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before its numbers are read. `file`: where it lies, for messages."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Tensors(Protocol):
    """A checkpoint: `infos` in file order, `files` that it is made of, `read` for one tensor's numbers."""

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, key: str) -> np.ndarray: ...


class SafetensorsFile:
    """One .safetensors file. Raises UserError when it is missing, cut off or not of that format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        header, self._data = _read_header(path)
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        end = self._data
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if (dtype := DTYPES.get(entry["dtype"])) is None:
                raise UserError(f"{path}: the tensor {key} has the unknown dtype {entry['dtype']}")
            info = TensorInfo(tuple(entry["shape"]), dtype, path)
            start, stop = entry["data_offsets"]
            if stop - start != info.nbytes:
                raise UserError(f"{path}: the tensor {key} has {stop - start} bytes, not {info.nbytes}")
            self.infos[key], self._starts[key] = info, self._data + start
            end = max(end, self._data + stop)
        size = path.stat().st_size
        if size < end:
            first = next(key for key in self.infos if self._starts[key] + self.infos[key].nbytes > size)
            raise UserError(
                f"{path} is cut off: {size} of {end} bytes are there, the tensor {first} is not complete; "
                "copy the file again"
            )

    def read(self, key: str) -> np.ndarray:
        info = self.infos[key]
        count = info.nbytes // info.dtype.itemsize
        array = np.fromfile(self.path, info.dtype, count, offset=self._starts[key])
        if array.size != count:
            raise UserError(f"{self.path} became shorter while the tensor {key} was read; copy it again")
        return array.reshape(info.shape)


class ShardedSafetensors:
    """The shards that a `*.safetensors.index.json` names.

    Raises UserError for a shard that is missing or damaged, a tensor that is not in the shard that the
    index names, and a tensor that the index does not name.
    """

    def __init__(self, index: Path) -> None:
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            raise UserError(f"{index} has no weight_map of tensors to shards; copy it again")
        self._shards: dict[str, SafetensorsFile] = {}
        for key, name in placed.items():
            if Path(name).name != name:
                raise UserError(f"{index}: the shard {name!r} of the tensor {key} must be a plain file name")
            if name not in self._shards:
                if not (index.parent / name).is_file():
                    others = sum(other == name for other in placed.values()) - 1
                    raise UserError(
                        f"{index.parent / name}: this shard is missing, which {index.name} names for the "
                        f"tensor {key} and {others} others; copy it there"
                    )
                self._shards[name] = SafetensorsFile(index.parent / name)
            if key not in self._shards[name].infos:
                raise UserError(
                    f"{index.parent / name} does not hold the tensor {key}, which {index.name} places there"
                )
        self.files = (index, *(shard.path for shard in self._shards.values()))
        self.infos: dict[str, TensorInfo] = {}
        self._placed = placed
        for name, shard in self._shards.items():
            for key, info in shard.infos.items():
                if placed.get(key) != name:
                    raise UserError(
                        f"{shard.path} holds the tensor {key}, which {index.name} does not place there"
                    )
                self.infos[key] = info

    def read(self, key: str) -> np.ndarray:
        return self._shards[self._placed[key]].read(key)


class Listing:
    """A list of keys, shapes and dtypes ({key: [shape, dtype]} as JSON) without numbers, for dry runs."""

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        try:
            self.infos = {
                key: TensorInfo(tuple(int(size) for size in shape), named_dtype(dtype), path)
                for key, (shape, dtype) in read_json(path).items()
            }
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is not a list of tensors as {{key: [shape, dtype]}}: {error}") from None

    def read(self, key: str) -> np.ndarray:
        raise UserError(f"{self.files[0]} lists {key} but holds no numbers: give the folder with --wan")


class LazyTensor:
    """A tensor whose numbers are read when numpy asks for them, every time."""

    def __init__(self, tensors: Tensors, key: str) -> None:
        self._tensors, self._key = tensors, key
        self.shape, self.dtype = tensors.infos[key].shape, tensors.infos[key].dtype
        self.ndim = len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._tensors.read(self._key), dtype)


class LazyTensors(Mapping[str, LazyTensor]):
    """A checkpoint as a mapping whose values are read on use."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> LazyTensor:
        return LazyTensor(self._tensors, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.infos)

    def __len__(self) -> int:
        return len(self._tensors.infos)


def open_safetensors(path: Path) -> SafetensorsFile | ShardedSafetensors:
    """A .safetensors file or a .safetensors.index.json."""
    return ShardedSafetensors(path) if path.name.endswith(".json") else SafetensorsFile(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is missing or holds something else."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy it there") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object; copy it again")
    return values


def named_dtype(name: str) -> np.dtype:
    """A dtype by numpy's or ml_dtypes' name. Raises TypeError for others."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The header of a safetensors file (an 8-byte length, then JSON) and where the data begins."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path} is cut off or no safetensors file (its header is not there)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            _, _, (_, _) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy it there") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no safetensors file (its header is not valid); copy it again") from None
    return header, 8 + length
