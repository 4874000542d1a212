"""Reading PyTorch files: lazily, and with a message for everything that can be wrong with them."""

import json
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lavatar_jax.checkpoints.sources import LazyTensors, Listing, SafetensorsFile, ShardedSafetensors
from lavatar_jax.errors import UserError
from tools.pth import PickledTensors


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "a.weight": rng.normal(size=(2, 2, 4)).astype(np.float32),
        "scalar": np.full((), 3.5, np.float16),
        "ids": np.arange(4, dtype=np.int64),
    }


def write_sharded(folder: Path) -> Path:
    placed = {}
    for number, key in enumerate(tensors()):
        name = f"part-{number // 2}.safetensors"
        placed[key] = name
        save_file({k: t for k, t in tensors().items() if placed.get(k) == name}, folder / name)
    index = folder / "index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    return index


def test_safetensors_are_read_one_by_one(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", {"format": "pt"})
    for source in (SafetensorsFile(tmp_path / "x.safetensors"), ShardedSafetensors(write_sharded(tmp_path))):
        assert source.infos.keys() == tensors().keys()
        for key, tensor in tensors().items():
            assert (source.infos[key].shape, source.infos[key].dtype) == (tensor.shape, tensor.dtype)
            np.testing.assert_array_equal(source.read(key), tensor, strict=True)
        lazy = LazyTensors(source)
        assert lazy["a.weight"].shape == (2, 2, 4)
        np.testing.assert_array_equal(np.asarray(lazy["a.weight"]), tensors()["a.weight"])


def test_a_file_that_is_cut_off_names_the_first_tensor_that_is_not_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file)
    last = list(SafetensorsFile(file).infos)[-1]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"x.safetensors is cut off: .* the tensor {last} is not complete"):
        SafetensorsFile(file)
    os.truncate(file, 20)
    with pytest.raises(UserError, match="cut off or no safetensors file"):
        SafetensorsFile(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\x04\0\0\0\0\0\0\0nope", "header is not valid"),
        (b"\x02\0\0\0\0\0\0\0[]", "header is not valid"),
        (b'\x10\0\0\0\0\0\0\0{"a": {"x": 1}} ', "header is not valid"),
        (
            b'\x3e\0\0\0\0\0\0\0{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}   ',
            "a has the unknown dtype F99",
        ),
        (
            b'\x3e\0\0\0\0\0\0\0{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}   ',
            "a has 4 bytes, not 8",
        ),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    index = write_sharded(tmp_path)
    placed = json.loads(index.read_text())["weight_map"]

    def broken(changes: dict[str, str | None]) -> None:
        kept = {key: name for key, name in (placed | changes).items() if name}
        index.write_text(json.dumps({"weight_map": kept}))
        ShardedSafetensors(index)

    with pytest.raises(UserError, match=r"part-9.safetensors: this shard is missing.* the tensor ids"):
        broken({"ids": "part-9.safetensors"})
    with pytest.raises(UserError, match=r"part-0.safetensors does not hold the tensor ids"):
        broken({"ids": "part-0.safetensors"})
    with pytest.raises(
        UserError, match=r"part-1.safetensors holds the tensor ids, which index.json does not"
    ):
        broken({"ids": None})
    with pytest.raises(UserError, match="plain file name"):
        broken({"ids": "../part-1.safetensors"})
    index.write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match="no weight_map"):
        ShardedSafetensors(index)


def test_a_list_of_tensors_has_shapes_but_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text('{"a": [[2, 3], "bfloat16"]}')
    listing = Listing(path)
    assert listing.infos["a"].nbytes == 12
    with pytest.raises(UserError, match="no numbers"):
        listing.read("a")
    for text in ('{"a": 3}', '{"a": [[2], "float99"]}', "[]", "{"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"list.json"):
            Listing(path)


def test_torch_files_are_read_by_the_weights_only_loader(tmp_path: Path, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    wide = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    made = {"a": wide.T, "half": wide.to(torch.bfloat16), "scalar": torch.tensor(2.0), "none": wide[:0]}
    torch.save(made, tmp_path / "x.pth")
    monkeypatch.setattr("tools.pth.REMAP_BYTES", 20)  # mapped anew for nearly every tensor
    source = PickledTensors(tmp_path / "x.pth")
    for _ in range(2):
        np.testing.assert_array_equal(source.read("a"), wide.T.numpy(), strict=True)
        half = wide.numpy().astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(source.read("half"), half, strict=True)
        assert source.read("scalar") == 2
        assert source.read("none").shape == (0, 4)


class Evil:
    """Unpickling this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    target = tmp_path / "was_run"
    torch.save({"a": torch.zeros(2), "b": Evil(target)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth is refused: it holds code .*mkdir"):
        PickledTensors(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"b": Evil(target)}))
    with pytest.raises(UserError, match=r"y\.pth is refused: .* a bare pickle may hold code"):
        PickledTensors(tmp_path / "y.pth")
    assert not target.exists()
    pickle.loads(pickle.dumps(Evil(target)))
    assert target.is_dir()  # it would have run


def test_other_torch_files_are_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"
    torch.save({"step": 3}, path)
    with pytest.raises(UserError, match="step is a int, not a tensor"):
        PickledTensors(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="holds a list"):
        PickledTensors(path)
    torch.save({"a": torch.zeros(1000)}, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="cut off"):
        PickledTensors(path)
    with pytest.raises(UserError, match="cannot be read"):
        PickledTensors(tmp_path / "nothing.pth")


def test_without_torch_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r'x.pth .* pip install "lavatar-jax\[convert\]"'):
        PickledTensors(tmp_path / "x.pth")
