"""`manifest.json` of a converted model folder: what it was made of, and every array with its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lavatar_jax.checkpoints.orbax_store import Chunks, layout_of, open_leaf
from lavatar_jax.checkpoints.sources import read_json
from lavatar_jax.errors import UserError

MANIFEST = "manifest.json"
DType = Literal["bf16", "fp8", "fp32"]  # fp8: bf16, but the transformer's large linear layers in e4m3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """An array: `sha256` is of its numbers in row-major order, little-endian."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @property
    def parameters(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One orbax checkpoint of the folder."""

    parameters: int
    bytes: int
    tensors: dict[str, Stored]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFile:
    file: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`. `lora`: file, sha256, pairs, scale, merged; None without adapters.

    `trained`: the run and step that the transformer is of, which is then not that of `sources`.
    """

    version: str  # of this project
    dtype: DType  # of the transformer; of the text encoder too, unless `trained`
    sources: tuple[SourceFile, ...]
    lora: dict[str, Any] | None
    components: dict[str, Component]
    trained: str | None = None
    complete: bool = True

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError when the folder has none, or it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{path} is missing: this is no converted model folder, or its conversion was not finished"
        )
    values = read_json(path)
    try:
        components = {
            name: Component(
                parameters=component["parameters"],
                bytes=component["bytes"],
                tensors={
                    key: Stored(shape=tuple(t["shape"]), dtype=t["dtype"], sha256=t["sha256"])
                    for key, t in component["tensors"].items()
                },
            )
            for name, component in values["components"].items()
        }
        sources = tuple(SourceFile(**source) for source in values["sources"])
        return Manifest(**values | {"components": components, "sources": sources})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from None


def hash_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """sha256 of a file's bytes. `advance` is told how many bytes were read since the last call."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(2**22))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def hash_leaf(folder: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """sha256 of an array's numbers, read chunk by chunk. Raises UserError if they cannot be read."""
    array = open_leaf(folder)
    shape = tuple(array.shape)
    chunks = Chunks(shape, *layout_of(array))
    digest = hashlib.sha256()
    for box in chunks.boxes():
        try:
            numbers = np.ascontiguousarray(array[box].read().result())
        except ValueError as error:
            raise UserError(f"{folder} is damaged ({str(error).split(' [')[0]})") from None
        digest.update(bytes_of(numbers))
        advance(numbers.nbytes)
    return digest.hexdigest()


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data
