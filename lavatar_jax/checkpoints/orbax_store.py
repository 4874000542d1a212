"""Orbax checkpoints written chunk by chunk, and read as models.

Orbax writes trees that are in memory. Here arrays larger than memory are written into the layout that it
reads: one folder per leaf in the zarr 3 format and `_METADATA`, a list of the leaves. A chunk is one file of
consecutive numbers (a few layers, a layer, or rows of one); inside it lie tiles, so that devices that share
a weight along either axis read their own part alone. Nothing is compressed, files depend on the numbers only.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.sources import read_json
from lavatar_jax.errors import UserError
from lavatar_jax.lora import AdaptedWeight
from lavatar_jax.quant import QuantizedWeight

CHUNK_BYTES = 128 * 2**20  # a larger layer is cut into rows
JOIN_BYTES = 2**20  # smaller layers share a chunk
TILES = 8  # along each axis of a chunk, where they divide it

_FIXED = (".values", ".inverse_scale", ".weight.a", ".weight.b")  # leaves that no restore casts

Model = TypeVar("Model")
Shape = tuple[int, ...]
Shardings = jax.sharding.Sharding | Callable[[str, Shape], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How a leaf is cut: `shape` of a chunk, which covers all axes but the first two; `tile` inside it."""

    leaf: Shape
    shape: Shape
    tile: Shape

    @property
    def count(self) -> int:
        return math.prod(-(-size // chunk) for size, chunk in zip(self.leaf, self.shape, strict=True))

    def boxes(self) -> Iterator[tuple[slice, ...]]:
        """The chunks' places in the leaf, in the order of its numbers in memory."""
        cuts = [
            [slice(start, min(start + step, size)) for start in range(0, size, step)]
            for size, step in zip(self.leaf, self.shape, strict=True)
        ]
        return itertools.product(*cuts)


def chunks_of(shape: Shape, itemsize: int, *, stacked: bool) -> Chunks:
    """The cut of a leaf; `stacked`: its first axis counts layers, which are separate tensors in a source."""
    chunk = list(shape)
    rows = 0
    if stacked:
        layer = itemsize * math.prod(shape[1:])
        chunk[0] = 1 if layer >= JOIN_BYTES else min(shape[0], max(JOIN_BYTES // layer, 1))
        rows = 1
    if len(shape) > rows:
        while itemsize * math.prod(chunk) > CHUNK_BYTES and chunk[rows] > 1:
            chunk[rows] = -(-chunk[rows] // 2)
    tile = list(chunk)
    if itemsize * math.prod(chunk) >= JOIN_BYTES:
        for axis in range(max(len(shape) - 2, 0), len(shape)):
            tile[axis] //= next(n for n in (TILES, 4, 2, 1) if tile[axis] % n == 0)
    return Chunks(shape, tuple(chunk), tuple(tile))


def create_leaf(folder: Path, chunks: Chunks, dtype: Any, *, sync: bool = True) -> ts.TensorStore:
    """An array to write into; one that was begun is opened again. `folder`: checkpoint / leaf's path.

    A chunk gets its name when it is complete; `sync`: and on disk.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    tiles = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": chunks.tile,
            "codecs": [little if np.dtype(dtype).itemsize > 1 else {"name": "bytes"}],
            "index_codecs": [little, {"name": "crc32c"}],
        },
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder.absolute()}/"},
        "metadata": {
            "shape": chunks.leaf,
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks.shape}},
            "codecs": [tiles],
        },
        "context": {"file_io_sync": sync},
        "store_data_equal_to_fill_value": True,  # else zeros would be files that are not there
    }
    return ts.open(spec, open=True, create=True).result()


def open_leaf(folder: Path) -> ts.TensorStore:
    """An array of a checkpoint that was written here, to be read in parts. Raises UserError if it is none."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder.absolute()}/"}}
    try:
        return ts.open(spec, open=True, read=True).result()
    except ValueError as error:
        reason = str(error).split(" [source")[0]
        raise UserError(f"{folder} cannot be read ({reason}); convert the checkpoint again") from None


def layout_of(array: ts.TensorStore) -> tuple[Shape, Shape]:
    """Shapes of an array's chunks, and of the tiles inside them."""
    layout: Any = array.chunk_layout  # whose shapes are None where there are no axes
    return tuple(layout.write_chunk.shape or ()), tuple(layout.read_chunk.shape or ())


def write_metadata(folder: Path, shapes: Mapping[str, Shape]) -> None:
    """`_METADATA`: what orbax needs to know to restore a flat dictionary of these arrays."""
    tree = {
        str((path,)): {
            "key_metadata": [{"key": path, "key_type": 2}],  # 2: key of a dictionary
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
        }
        for path, shape in sorted(shapes.items())
    }
    values = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(values, indent=1))


def stored_leaves(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of a checkpoint. Raises UserError naming what is missing or cut off."""
    try:
        paths = [key[2:-3] for key in json.loads((folder / "_METADATA").read_text())["tree_metadata"]]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} holds no checkpoint (no valid _METADATA); convert it again") from None
    leaves = {}
    for path in sorted(paths):
        array = open_leaf(folder / path)
        leaves[path] = jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
        _check_files(folder / path, array)
    return leaves


def alone() -> ocp.options.MultiprocessingOptions:
    """For orbax: this process waits for no other one."""
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


def reader() -> ocp.Checkpointer:
    """Restores pytrees: every process its own parts, whatever the others do."""
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone())
    return ocp.Checkpointer(handler, multiprocessing_options=alone())


def restore_leaves(
    folder: Path, leaves: Mapping[str, jax.ShapeDtypeStruct], shardings: Shardings | None = None
) -> dict[str, jax.Array]:
    """Arrays of an orbax checkpoint by path, some or all, in these dtypes, each device reading its own part.

    `shardings`: one for all, or a function of path and shape; None: the first device. Raises UserError for
    files that cannot be read.
    """
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arguments = {
        path: ocp.ArrayRestoreArgs(
            sharding=shardings(path, leaf.shape) if callable(shardings) else shardings,
            global_shape=leaf.shape,
            dtype=leaf.dtype,
        )
        for path, leaf in leaves.items()
    }
    request = ocp.args.PyTreeRestore(item=dict(leaves), restore_args=arguments, partial_restore=True)
    with reader() as checkpointer:
        try:
            return checkpointer.restore(folder.absolute(), args=request)
        except Exception as error:  # orbax has no class for it
            if (loss := re.search(r"DATA_LOSS: (.*?)(?= \[|$)", f"{error} {error.__cause__}")) is None:
                raise
            raise UserError(f"{folder} is damaged ({loss[1]}); copy or convert it again") from None


def restore_component(
    folder: Path,
    component: str,
    abstract_model: Model,
    shardings: Shardings | None = None,
    *,
    dtype: Any = None,
) -> Model:
    """A model of a converted folder: `component` is "dit", "vae", "text" or "speech".

    `abstract_model` comes from jax.eval_shape of the constructor; its dtypes are not used. Parameters have
    the stored dtype, or `dtype` (which leaves adapters, and 8-bit weights and their scales alone). Weights
    that are stored quantised or with adapters come out as `QuantizedWeight`s and `AdaptedWeight`s.
    `shardings` as in `restore_leaves`.

    Raises UserError when files are missing or cut off, or leaves do not fit the model.
    """
    place = Path(folder) / component
    stored = stored_leaves(place)
    wanted = param_paths(abstract_model)
    parts = {path: _parts(path, stored) for path in wanted}
    used = {name for names in parts.values() for name in names}
    problems = [f"{path} is missing" for path, names in parts.items() if not names]
    problems += [f"{path} is unknown" for path in stored if path not in used]
    problems += [
        f"{path} has shape {list(stored[parts[path][0]].shape)} instead of {list(leaf.shape)}"
        for path, leaf in wanted.items()
        if parts[path] and stored[parts[path][0]].shape != leaf.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{place} does not fit the model of config.json: {'; '.join(problems[:3])}{more}")
    restored = restore_leaves(
        place,
        {
            path: leaf if dtype is None or path.endswith(_FIXED) else jax.ShapeDtypeStruct(leaf.shape, dtype)
            for path, leaf in stored.items()
        },
        shardings,
    )
    adapted = any(path.endswith(".weight.a") for path in stored.keys() - wanted.keys())
    scale = read_json(Path(folder) / "manifest.json")["lora"]["scale"] if adapted else 1.0
    filled = [_weight(path, restored, scale) for path in wanted]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract_model), filled)


def _parts(path: str, stored: Mapping[str, Any]) -> list[str]:
    """The stored leaves that make up a parameter; the first has its shape."""
    if path in stored:
        return [path]
    split = [f"{path}.values", f"{path}.inverse_scale"]
    adapters = [f"{path}.a", f"{path}.b"]
    if all(name in stored for name in split):
        return split
    if all(name in stored for name in adapters) and (base := _parts(f"{path}.base", stored)):
        return base + adapters
    return []


def _weight(path: str, arrays: Mapping[str, jax.Array], scale: float) -> Any:
    """The parameter that `_parts` found."""
    if path in arrays:
        return arrays[path]
    if f"{path}.values" in arrays:
        return QuantizedWeight(arrays[f"{path}.values"], arrays[f"{path}.inverse_scale"])
    base = _weight(f"{path}.base", arrays, scale)
    return AdaptedWeight(base, arrays[f"{path}.a"], arrays[f"{path}.b"], scale)


def _check_files(folder: Path, array: ts.TensorStore) -> None:
    """That all chunks are there in full: a missing one would silently be read as zeros."""
    chunk, tile = layout_of(array)
    tiles = math.prod(a // b for a, b in zip(chunk, tile, strict=True))
    whole = math.prod(chunk) * array.dtype.numpy_dtype.itemsize
    counts = [range(-(-size // step)) for size, step in zip(array.shape, chunk, strict=True)]
    for place in itertools.product(*counts):
        file = folder.joinpath("c", *map(str, place))
        try:
            size = file.stat().st_size
        except OSError:
            raise UserError(f"{file} is missing; copy it again, or convert the checkpoint again") from None
        # A chunk over the edge of the array leaves out the tiles behind it.
        inside = all((i + 1) * c <= n for i, c, n in zip(place, chunk, array.shape, strict=True))
        if size < 16 * tiles + 4 or (inside and size != whole + 16 * tiles + 4):
            raise UserError(f"{file} is cut off ({size} bytes); copy it again")
