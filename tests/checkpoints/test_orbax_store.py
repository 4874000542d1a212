"""Checkpoints written chunk by chunk: orbax reads them, on any mesh, each byte once."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavatar_jax.checkpoints import orbax_store
from lavatar_jax.checkpoints.orbax_store import (
    chunks_of,
    create_leaf,
    open_leaf,
    restore_component,
    restore_leaves,
    stored_leaves,
    write_metadata,
)
from lavatar_jax.errors import UserError
from lavatar_jax.quant import QuantizedWeight


def write(folder: Path, arrays: dict[str, np.ndarray], stacked: tuple[str, ...] = ()) -> None:
    for path, array in arrays.items():
        (folder / path).mkdir(parents=True)
        chunks = chunks_of(array.shape, array.dtype.itemsize, stacked=path in stacked)
        leaf = create_leaf(folder / path, chunks, array.dtype)
        for box in chunks.boxes():
            leaf[box].write(np.ascontiguousarray(array[box])).result()
    write_metadata(folder, {path: array.shape for path, array in arrays.items()})


def arrays_of(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "layers.weight": rng.normal(size=(3, 1024, 768)).astype(ml_dtypes.bfloat16),
        "layers.bias": np.zeros((3, 1024), np.float32),
        "codes": rng.normal(size=(2, 1024, 1024)).astype(ml_dtypes.float8_e4m3fn),
        "table": rng.normal(size=(1001, 300)).astype(np.float32),
    }


def bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def assert_equal(found: dict, arrays: dict[str, np.ndarray]) -> None:
    assert found.keys() == arrays.keys()
    for path, array in arrays.items():
        assert found[path].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(found[path]), array, err_msg=path)


@pytest.mark.parametrize(
    ("shape", "stacked", "chunk", "count"),
    [
        ((40, 5120, 5120), True, (1, 5120, 5120), 40),
        ((40, 5120, 13824), True, (1, 2560, 13824), 80),
        ((40, 5120), True, (40, 5120), 1),
        ((256384, 4096), False, (16024, 4096), 16),
        ((5120,), False, (5120,), 1),
    ],
)
def test_a_chunk_is_a_layer_rows_of_one_or_several_small_ones(shape, stacked, chunk, count) -> None:
    chunks = chunks_of(shape, 2, stacked=stacked)
    assert (chunks.shape, chunks.count, len(list(chunks.boxes()))) == (chunk, count, count)
    assert 2 * np.prod(chunk) <= orbax_store.CHUNK_BYTES
    assert all(size % tile == 0 for size, tile in zip(chunk, chunks.tile, strict=True))


def test_boxes_go_through_the_leaf_in_the_order_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_store, "CHUNK_BYTES", 40)
    monkeypatch.setattr(orbax_store, "JOIN_BYTES", 1)
    array = np.arange(2 * 7 * 5).reshape(2, 7, 5)
    boxes = list(chunks_of(array.shape, 1, stacked=True).boxes())
    assert len(boxes) == 2
    np.testing.assert_array_equal(np.concatenate([array[box].ravel() for box in boxes]), array.ravel())
    monkeypatch.setattr(orbax_store, "CHUNK_BYTES", 10)
    boxes = list(chunks_of(array.shape, 1, stacked=True).boxes())
    assert len(boxes) == 8
    np.testing.assert_array_equal(np.concatenate([array[box].ravel() for box in boxes]), array.ravel())


@pytest.mark.parametrize("axis", [None, 1, 2])
def test_a_restore_onto_four_devices_reads_each_byte_once(tmp_path: Path, axis: int | None) -> None:
    arrays = arrays_of()
    write(tmp_path, arrays, stacked=("layers.weight", "layers.bias", "codes"))
    size = sum(file.stat().st_size for file in tmp_path.rglob("c/**/*") if file.is_file())
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    spec = P() if axis is None else P(*[None] * axis, "tensor")

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, spec if len(shape) == 3 else P())

    leaves = stored_leaves(tmp_path)
    before = bytes_read()
    restored = restore_leaves(tmp_path, leaves, sharding)
    assert size <= bytes_read() - before < 1.01 * size + 10_000  # and the small files that describe them
    assert_equal(restored, arrays)
    assert restored["layers.weight"].sharding == sharding("", (1, 1, 1))


def test_orbax_itself_restores_it(tmp_path: Path) -> None:
    arrays = arrays_of(1)
    write(tmp_path, arrays, stacked=("codes",))
    abstract = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in arrays.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tmp_path).item_metadata
        assert {path: metadata[path].shape for path in arrays} == {p: a.shape for p, a in arrays.items()}
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
            for path, leaf in abstract.items()
        }
        assert_equal(checkpointer.restore(tmp_path, abstract), arrays)


def test_files_depend_on_the_numbers_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, arrays_of(2), stacked=("codes",))
    for file in sorted((tmp_path / "a").rglob("*")):
        if file.is_file():
            other = tmp_path / "b" / file.relative_to(tmp_path / "a")
            assert file.read_bytes() == other.read_bytes(), file


class Layer(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.zeros((4, 6)))
        self.bias = nnx.Param(jnp.zeros(6))


def layer_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "weight": rng.normal(size=(4, 6)).astype(ml_dtypes.bfloat16),
        "bias": rng.normal(size=6).astype(ml_dtypes.bfloat16),
    }


def test_a_component_is_a_model_in_the_stored_or_the_wanted_dtype(tmp_path: Path) -> None:
    arrays = layer_arrays()
    write(tmp_path / "dit", arrays)
    abstract = jax.eval_shape(Layer)
    stored = restore_component(tmp_path, "dit", abstract)
    assert isinstance(stored, Layer)
    assert_equal({"weight": stored.weight[...], "bias": stored.bias[...]}, arrays)
    wide = restore_component(tmp_path, "dit", abstract, dtype=jnp.float32)
    np.testing.assert_array_equal(wide.weight[...], arrays["weight"].astype(np.float32))


def test_quantised_weights_come_out_as_such(tmp_path: Path) -> None:
    codes = layer_arrays()["weight"].astype(ml_dtypes.float8_e4m3fn)
    scale = np.full((1, 1), 0.5, np.float32)
    bias = layer_arrays()["bias"]
    write(tmp_path / "dit", {"weight.values": codes, "weight.inverse_scale": scale, "bias": bias})
    layer = restore_component(tmp_path, "dit", jax.eval_shape(Layer), dtype=jnp.float32)
    weight = layer.weight.get_value()
    assert isinstance(weight, QuantizedWeight)
    assert (weight.values.dtype, layer.bias.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    np.testing.assert_array_equal(weight.dequantize(), 0.5 * codes.astype(np.float32))


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "dit", layer_arrays())
    file = tmp_path / "dit/weight/c/0/0"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match="DATA_LOSS") as caught:
        open_leaf(tmp_path / "dit/weight").read().result()

    asked: list[bool] = []

    def fail(*arguments, **options) -> None:
        """As orbax does, whose other reads are then left unfinished: Python complains in some later test."""
        asked.append(True)
        raise Exception("Encountered error while reading array") from caught.value

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", fail)
    with pytest.raises(UserError, match=r"dit is damaged .*weight/c/0/0"):
        restore_component(tmp_path, "dit", jax.eval_shape(Layer))
    assert asked


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    abstract = jax.eval_shape(Layer)
    with pytest.raises(UserError, match="_METADATA"):
        restore_component(tmp_path, "dit", abstract)
    write(tmp_path / "dit", layer_arrays())
    file = tmp_path / "dit/weight/c/0/0"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(UserError, match="weight/c/0/0 is cut off"):
        restore_component(tmp_path, "dit", abstract)
    file.unlink()
    with pytest.raises(UserError, match="weight/c/0/0 is missing"):
        restore_component(tmp_path, "dit", abstract)
    (tmp_path / "dit/weight/zarr.json").unlink()
    with pytest.raises(UserError, match="weight cannot be read"):
        open_leaf(tmp_path / "dit/weight")
    write(tmp_path / "other/dit", {"weight": np.zeros((2, 6), np.float32), "odd": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"bias is missing; odd is unknown; weight has shape \[2, 6\]"):
        restore_component(tmp_path / "other", "dit", abstract)
