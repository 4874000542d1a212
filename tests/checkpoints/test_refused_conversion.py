"""What cannot be converted is one clear line, and nothing is written."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import published
from tests.checkpoints.conversions import command, contents
from tests.published import Published
from tools.convert import main as convert_main


@pytest.fixture
def broken(source: Published, tmp_path: Path) -> Path:
    return shutil.copytree(source.wan, tmp_path / "wan")


def refused(folder: Path, capsys, *options: str | Path) -> str:
    """The one line that says why a folder is refused."""
    out = folder.parent / "out"
    assert command(convert_main, "--wan", folder, "--out", out, *options) == 2
    assert not [path for path in folder.parent.iterdir() if path.name.startswith("out")]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def edit_shard(folder: Path, change) -> str:
    """Changes the tensors of the second shard; -> its name."""
    name = sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))[1]
    tensors = load_file(name)
    change(tensors)
    save_file(tensors, name)
    return name.name


def edit_config(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_a_missing_or_truncated_shard_is_named(broken: Path, capsys) -> None:
    shard = sorted(broken.glob("diffusion_pytorch_model-*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 10)
    error = refused(broken, capsys)
    assert f"{shard} is cut off" in error
    assert any(f"the tensor {key} is not complete" in error for key in load_index(broken, shard.name))
    shard.unlink()
    error = refused(broken, capsys)
    assert f"{shard}: this shard is missing" in error
    assert next(iter(load_index(broken, shard.name))) in error


def load_index(folder: Path, shard: str) -> list[str]:
    placed = json.loads((folder / published.INDEX).read_text())["weight_map"]
    return [key for key, name in placed.items() if name == shard]


def test_a_wrong_shape_dtype_or_name_is_named(broken: Path, source: Published, capsys) -> None:
    key = "blocks.1.ffn.0.weight"

    def narrow(tensors: dict) -> None:
        tensors[key] = tensors[key][:, :-1].copy()

    name = edit_shard(broken, lambda tensors: None)
    assert key in load_index(broken, name)
    edit_shard(broken, narrow)
    assert f"{name}: the tensor {key} has shape [48, 31], expected [48, 32]" in refused(broken, capsys)
    edit_shard(broken, lambda tensors: tensors.update({key: np.zeros((48, 32), np.int32)}))
    assert f"{name}: the tensor {key} has dtype int32" in refused(broken, capsys)
    edit_shard(broken, lambda tensors: tensors.pop(key))
    assert f"{name} does not hold the tensor {key}" in refused(broken, capsys)
    edit_shard(broken, lambda tensors: tensors.update({key: source.dit[key], "odd": np.zeros(3)}))
    assert f"{name} holds the tensor odd" in refused(broken, capsys)
    codes = np.zeros((48, 32), ml_dtypes.float8_e4m3fn)  # what they mean is in a scale that is elsewhere
    edit_shard(broken, lambda tensors: (tensors.pop("odd"), tensors.update({key: codes})))
    assert f"{name}: the tensor {key} has dtype float8_e4m3fn" in refused(broken, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanModel"}, "the architecture 'WanModel' is not supported"),
        ({"enable_motioner": True}, "enable_motioner True is not supported"),
        ({"adain_mode": "other"}, "adain_mode 'other' is not supported"),
        ({"new_trick": True}, "the setting new_trick True is unknown"),
        ({"num_heads": 3}, "must split into 3 heads"),
        ({"num_layers": 5}, "the tensor blocks.4.cross_attn.k.weight is missing"),
        ({"text_dim": 25}, "the transformer's text_dim is 25, its encoder gives 24"),
        ({"cond_dim": 8}, "in_dim, out_dim and cond_dim differ"),
    ],
)
def test_another_architecture_is_refused(broken: Path, capsys, change: dict, message: str) -> None:
    edit_config(broken, **change)
    error = refused(broken, capsys)
    assert message in error
    assert str(broken) in error or error.startswith(("error: config.json: ", f"error: {broken.name}: "))


@pytest.mark.parametrize(
    "name", ["config.json", published.VAE, published.TEXT, f"{published.SPEECH}/config.json",
             f"{published.SPEECH}/model.safetensors"],
)  # fmt: skip
def test_a_missing_file_is_named(broken: Path, capsys, name: str) -> None:
    (broken / name).unlink()
    assert str(broken / name) in refused(broken, capsys)


def test_code_in_a_pickle_is_refused_and_not_run(broken: Path, capsys) -> None:
    torch = pytest.importorskip("torch")
    target = broken.parent / "was_run"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    torch.save({"encoder.conv1.weight": Evil()}, broken / published.VAE)
    error = refused(broken, capsys)
    assert published.VAE in error
    assert "refused" in error
    assert not target.exists()


def test_wrong_options_and_adapters(broken: Path, source: Published, capsys, tmp_path: Path) -> None:
    assert "need the adapters" in refused(broken, capsys, "--keep-lora")
    assert "exclude each other" in refused(broken, capsys, "--keep-lora", "--merge-lora")
    assert "--dtype fp8" in refused(broken, capsys, "--per-channel")
    for extra in (("--lora", source.lora), ("--dtype", "fp8"), ("--out", "x"), ("--preset", "paper")):
        assert command(convert_main, "--manifest", broken / "none.json", "--dry-run", *extra) == 2
        assert "without any other option" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    assert "no such file" in refused(broken, capsys, "--lora", other)
    save_file({"nothing": np.zeros(3, np.float32)}, other)
    assert "other.safetensors" in refused(broken, capsys, "--lora", other)
    tensors = load_file(source.lora)
    key = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {key: np.zeros(tensors[key].shape, np.int8)}, other)
    assert f"{key} has dtype int8" in refused(broken, capsys, "--lora", other)


def test_a_full_disk_and_an_existing_result_are_told_before(broken: Path, capsys, monkeypatch) -> None:
    usage = shutil._ntuple_diskusage(10, 10, 1000) if hasattr(shutil, "_ntuple_diskusage") else None
    monkeypatch.setattr("lavatar_jax.checkpoints.conversion.shutil.disk_usage", lambda place: usage)
    assert "0.0 GB of free space" in refused(broken, capsys)
    monkeypatch.undo()
    (broken.parent / "file").touch()
    assert command(convert_main, "--wan", broken, "--out", broken.parent / "file" / "model") == 2
    error = capsys.readouterr().err
    assert "file/model: cannot be written (Not a directory)" in error
    assert error.count("\n") == 1
    (broken.parent / "model").mkdir()
    assert command(convert_main, "--wan", broken, "--out", broken.parent / "model") == 2
    assert "exists already" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_lists_what_does_not_fit(broken: Path, source, capsys) -> None:
    before = contents(broken.parent)
    assert command(convert_main, "--wan", broken, "--lora", source.lora, "--dry-run") == 0
    shown = capsys.readouterr().out
    for count in ("168", "194", "22", "88", "96"):
        assert f" {count} " in shown
    assert contents(broken.parent) == before
    edit_config(broken, num_layers=5, audio_inject_layers=[0])
    assert command(convert_main, "--wan", broken, "--dry-run") == 2
    shown = capsys.readouterr().out
    assert "the tensor blocks.4.ffn.0.weight is missing" in shown
    assert "audio_injector.injector.1.q.weight is of a layer" in shown
