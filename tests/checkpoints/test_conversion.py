"""Published folders become model folders, and back: every number, in bounded steps, or one clear line."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lavatar_jax import lora, quant
from lavatar_jax.checkpoints import exporting, orbax_store, stream_write
from lavatar_jax.checkpoints.conversion import JOURNAL, Task, convert_folder
from lavatar_jax.checkpoints.convert import convert, param_paths
from lavatar_jax.checkpoints.dry_run import plan_listings
from lavatar_jax.checkpoints.lora_keys import merged, read_lora
from lavatar_jax.checkpoints.manifest import hash_file, hash_leaf, read_manifest
from lavatar_jax.checkpoints.orbax_store import restore_component, restore_leaves, stored_leaves
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.cli import run
from lavatar_jax.errors import UserError
from lavatar_jax.models.dit import CausalDiT
from tests import published
from tests.published import Published, write_published
from tests.shared import shared_path
from tools.convert import main as convert_main
from tools.export_torch import main as export_main
from tools.inspect_checkpoint import main as inspect_main
from tools.pth import PickledTensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def bf16(source: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without LoRA."""
    out = tmp_path_factory.mktemp("bf16") / "model"
    convert_folder(Task(wan=source.wan, out=out), PickledTensors)
    return out


def task_of(source: Published, out: Path, **changes) -> Task:
    return dataclasses.replace(Task(wan=source.wan, out=out), **changes)


def abstract_dit() -> CausalDiT:
    return jax.eval_shape(lambda: CausalDiT(published.DIT_CONFIG, rngs=nnx.Rngs(0)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def chunks_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("c/**/*") if path.is_file()]


def command(main, *arguments: str | Path) -> int:
    return run(lambda: main([str(argument) for argument in arguments]))


def test_the_streamed_parameters_are_those_of_the_table(source: Published, bf16: Path) -> None:
    expected = param_paths(convert(source.dit, DIT_RULES, abstract_dit()))
    found = restore_component(bf16, "dit", abstract_dit())
    for path, value in param_paths(found).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value.astype(jnp.float32), expected[path], err_msg=path)
    for component, dtype in (("vae", "float32"), ("text", "bfloat16"), ("speech", "float32")):
        assert {leaf.dtype.name for leaf in stored_leaves(bf16 / component).values()} == {dtype}


def test_the_manifest_tells_where_the_numbers_are_from(source: Published, bf16: Path) -> None:
    manifest = read_manifest(bf16)
    assert manifest.complete
    assert manifest.lora is None
    assert set(manifest.components) == {"dit", "vae", "text", "speech"}
    hashes = {entry.file: entry.sha256 for entry in manifest.sources}
    assert len(hashes) == 4 + 1 + 2 + 1 + 2 + 4  # shards, index, .pth, speech, settings, tokenizer
    for file, sha256 in hashes.items():
        assert hash_file(source.wan / file) == sha256
    for name, component in manifest.components.items():
        leaves = restore_leaves(bf16 / name, stored_leaves(bf16 / name))
        assert component.parameters == sum(leaf.size for leaf in leaves.values())
        for path, stored in component.tensors.items():
            assert hash_leaf(bf16 / name / path) == stored.sha256
    assert not (bf16 / JOURNAL).exists()
    assert (bf16 / "tokenizer/tokenizer.json").is_file()


@pytest.mark.parametrize("per_channel", [False, True])
def test_8_bit_weights_are_those_of_the_quantised_model(
    source: Published, bf16: Path, tmp_path: Path, per_channel: bool
) -> None:
    convert_folder(task_of(source, tmp_path / "fp8", dtype="fp8", per_channel=per_channel), PickledTensors)
    found = param_paths(restore_component(tmp_path / "fp8", "dit", abstract_dit()))
    model = restore_component(bf16, "dit", abstract_dit())
    expected = param_paths(quant.quantize(model, per_channel=per_channel))
    assert found.keys() == expected.keys()
    assert sum(path.endswith(".values") for path in found) == 15
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), err_msg=path)


def test_adapters_are_merged_in_float32_and_rounded_once(source: Published, tmp_path: Path) -> None:
    convert_folder(task_of(source, tmp_path / "model", lora=source.lora, dtype="fp32"), PickledTensors)
    pairs = read_lora(source.adapters)
    tensors = {
        key: merged(tensor.astype(np.float32), pairs[key.removesuffix(".weight")])
        if key.removesuffix(".weight") in pairs
        else tensor
        for key, tensor in source.dit.items()
    }
    expected = param_paths(convert(tensors, DIT_RULES, abstract_dit()))
    found = param_paths(restore_component(tmp_path / "model", "dit", abstract_dit()))
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    record = read_manifest(tmp_path / "model").lora
    assert record is not None
    assert (record["pairs"], record["scale"], record["merged"]) == (48, 0.5, True)


def test_adapters_can_stay_beside_the_weights_and_go_back(source: Published, tmp_path: Path) -> None:
    convert_folder(task_of(source, tmp_path / "model", lora=source.lora, merge=False), PickledTensors)
    leaves = stored_leaves(tmp_path / "model/dit")
    for part, shape in (("base", (4, 32, 48)), ("a", (4, 32, 4)), ("b", (4, 4, 48))):
        assert leaves[f"blocks.ffn.inner.weight.{part}"].shape == shape
    convert_folder(task_of(source, tmp_path / "merged", lora=source.lora), PickledTensors)
    model = restore_component(tmp_path / "model", "dit", abstract_dit())
    expected = param_paths(restore_component(tmp_path / "merged", "dit", abstract_dit()))
    for path, value in param_paths(lora.merge(model)).items():
        assert value.dtype == jnp.bfloat16
        wide, want = (np.asarray(x, np.float32) for x in (value, expected[path]))
        np.testing.assert_allclose(wide, want, rtol=2**-7, atol=1e-6, err_msg=path)  # one bit: other sums
    mixed = restore_component(tmp_path / "model", "dit", abstract_dit(), dtype=jnp.float32)
    weight = mixed.blocks.ffn.inner.weight.get_value()
    assert (weight.base.dtype, weight.a.dtype, weight.scale) == (jnp.float32, jnp.float32, 0.5)
    assert command(export_main, tmp_path / "model", "--out", tmp_path / "torch") == 0
    found = load_file(tmp_path / "torch" / published.LORA)
    alphas = {key for key in found if key.endswith(".alpha")}
    assert found.keys() - alphas == source.adapters.keys()
    assert len(alphas) == len(source.adapters) // 2
    for key, tensor in source.adapters.items():
        np.testing.assert_array_equal(found[key], tensor, strict=True, err_msg=key)


@pytest.mark.parametrize("mixed", [False, True], ids=["alpha = rank", "mixed"])
def test_adapters_change_as_much_when_they_come_back(source: Published, tmp_path: Path, mixed: bool) -> None:
    """For a reader that knows alpha, and for the released one, which takes 0.5 for everything."""
    given = dict(source.adapters)
    for number, key in enumerate(source.adapters):
        if ".lora_A." in key:
            alpha = float([1, 2, 4, 8][number // 2 % 4] if mixed else published.LORA_RANK)
            given[f"{key.split('.lora_A.')[0]}.alpha"] = np.array(alpha, np.float32)
    save_file(given, tmp_path / "given.safetensors")
    task = task_of(source, tmp_path / "model", lora=tmp_path / "given.safetensors", merge=False)
    convert_folder(task, PickledTensors)
    assert command(export_main, tmp_path / "model", "--out", tmp_path / "torch") == 0
    exported = load_file(tmp_path / "torch" / published.LORA)
    pairs, wanted = read_lora(exported), read_lora(given)
    assert pairs.keys() == wanted.keys()
    assert {pair.scale() for pair in wanted.values()} == ({0.25, 0.5, 1, 2} if mixed else {1})
    for module, pair in pairs.items():
        want = wanted[module].scale() * wanted[module].b @ wanted[module].a
        np.testing.assert_allclose(0.5 * pair.b @ pair.a, want, rtol=1e-5, atol=1e-7, err_msg=module)
        assert pair.scale() == 0.5
        assert pair.alpha is not None


def test_the_way_to_pytorch_and_back_keeps_every_bit(source: Published, bf16: Path, tmp_path: Path) -> None:
    assert command(export_main, bf16, "--out", tmp_path / "torch", "--shard-gb", "1e-4") == 0
    index = json.loads((tmp_path / "torch" / published.INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    dit = {key: x for name in shards for key, x in load_file(tmp_path / "torch" / name).items()}
    for name, expected, found in (
        ("dit", source.dit, dit),
        ("vae", source.vae, load_file((tmp_path / "torch" / published.VAE).with_suffix(".safetensors"))),
        ("text", source.text, load_file((tmp_path / "torch" / published.TEXT).with_suffix(".safetensors"))),
        ("speech", source.speech, load_file(tmp_path / "torch" / published.SPEECH / "model.safetensors")),
    ):
        assert found.keys() == expected.keys(), name
        for key, tensor in expected.items():
            np.testing.assert_array_equal(found[key], tensor, strict=True, err_msg=key)
    assert command(convert_main, "--wan", tmp_path / "torch", "--out", tmp_path / "again") == 0
    assert read_manifest(tmp_path / "again").components == read_manifest(bf16).components


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, capsys, monkeypatch) -> None:
    """A disk that is too small is told before; one that is full, and a folder that cannot be, in one line."""
    out = tmp_path / "torch"
    usage = shutil._ntuple_diskusage(10, 10, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert command(export_main, "tiny", "--out", out) == 2
    assert "0.0 GB of free space" in capsys.readouterr().err
    monkeypatch.undo()

    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_safetensors", full)
    assert command(export_main, "tiny", "--out", out) == 2
    assert capsys.readouterr().err == f"error: {out}: the disk is full; free some space or write elsewhere\n"
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "torch"
    assert command(export_main, "tiny", "--out", out) == 2
    assert capsys.readouterr().err == f"error: {out}: cannot be written (Not a directory)\n"


def test_a_model_that_was_trained_here_goes_to_pytorch_too(tmp_path: Path) -> None:
    assert command(export_main, "tiny", "--out", tmp_path / "torch") == 0
    index = json.loads((tmp_path / "torch" / published.INDEX).read_text())
    assert "blocks.0.self_attn.q.weight" in index["weight_map"]
    assert (tmp_path / "torch/Wan2.2_VAE.safetensors").is_file()


def test_inspection_tells_complete_from_damaged(bf16: Path, tmp_path: Path, capsys) -> None:
    assert command(inspect_main, bf16, "--verify") == 0
    shown = capsys.readouterr().out
    assert "all hashes are right" in shown
    assert "241,180" in shown
    folder = shutil.copytree(bf16, tmp_path / "model")
    chunk = chunks_of(folder / "vae/decoder.conv_in.weight")[0]
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    assert command(inspect_main, folder) == 0
    assert command(inspect_main, folder, "--verify") == 2
    assert "vae/decoder.conv_in.weight has other numbers" in capsys.readouterr().err
    chunk.unlink()
    assert command(inspect_main, folder) == 2
    assert str(chunk) in capsys.readouterr().err
    (folder / "manifest.json").unlink()
    assert command(inspect_main, folder) == 2


# Killed and gone on with

SCRIPT = """
import os, signal, sys
from pathlib import Path
from lavatar_jax.checkpoints import conversion, journal, orbax_store, stream_write
from tools.pth import PickledTensors

point, count, wan, lora, out = sys.argv[1:]
orbax_store.CHUNK_BYTES, orbax_store.JOIN_BYTES, stream_write.SYNC_BYTES = 2**15, 1, 2**16
calls = 0

def killing(function):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

if point == "record":  # a chunk is written, but not in the journal
    journal.Journal.record = killing(journal.Journal.record)
elif point == "rename":  # all is done, but not under its name
    conversion.os.replace = killing(os.replace)
conversion.convert_folder(
    conversion.Task(wan=Path(wan), lora=Path(lora), out=Path(out), dtype="fp8"), PickledTensors
)
"""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of the small model have many chunks, as those of a large one."""
    monkeypatch.setattr(orbax_store, "CHUNK_BYTES", 2**15)
    monkeypatch.setattr(orbax_store, "JOIN_BYTES", 1)
    monkeypatch.setattr(stream_write, "SYNC_BYTES", 2**16)


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_conversion_goes_on_and_ends_the_same(source: Published, tmp_path: Path) -> None:
    task = task_of(source, tmp_path / "whole", lora=source.lora, dtype="fp8")
    convert_folder(task, PickledTensors)
    expected = contents(tmp_path / "whole")
    assert len(chunks_of(tmp_path / "whole/dit/blocks.ffn.inner.weight.values")) == 4
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    kept: dict[Path, os.stat_result] = {}
    for point, count in (("record", 3), ("record", 160), ("rename", 1)):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, point, str(count), source.wan, source.lora, out],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        for path, before in kept.items():
            after = path.stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), path
        chunks = sorted(chunks_of(partial), key=lambda path: path.stat().st_mtime_ns)
        assert chunks
        kept = {path: path.stat() for path in chunks[:-2]}  # the last two may not be in the journal yet
    convert_folder(dataclasses.replace(task, out=out), PickledTensors)
    assert not partial.exists()
    assert contents(out) == expected


@pytest.mark.usefixtures("small_chunks")
def test_what_was_damaged_since_is_written_anew(source: Published, tmp_path: Path, monkeypatch) -> None:
    task = task_of(source, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr("lavatar_jax.checkpoints.conversion.os.replace", lambda *paths: _stop())
        with pytest.raises(KeyboardInterrupt):
            convert_folder(task, PickledTensors)
    partial = tmp_path / "model.partial"
    lines = (partial / JOURNAL).read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if b"dit/blocks.ffn.inner.weight" in line)
    (partial / JOURNAL).write_bytes(b"".join(lines[: first + 3]) + lines[first + 3][:9])  # torn by a crash
    chunk = partial / "dit/blocks.ffn.inner.weight/c/0/0/0"
    content = chunk.read_bytes()
    chunk.write_bytes(bytes(len(content) - 20) + content[-20:])
    convert_folder(task, PickledTensors)
    assert (tmp_path / "model/dit/blocks.ffn.inner.weight/c/0/0/0").read_bytes() == content
    assert command(inspect_main, tmp_path / "model", "--verify") == 0


def _stop() -> None:
    raise KeyboardInterrupt


def test_a_begun_conversion_must_not_change_its_mind(source: Published, tmp_path: Path, monkeypatch) -> None:
    task = task_of(source, tmp_path / "model")
    monkeypatch.setattr("lavatar_jax.checkpoints.conversion.os.replace", lambda *paths: _stop())
    with pytest.raises(KeyboardInterrupt):
        convert_folder(task, PickledTensors)
    with pytest.raises(UserError, match=r"model.partial was begun with another --dtype"):
        convert_folder(dataclasses.replace(task, dtype="fp8"), PickledTensors)
    with pytest.raises(UserError, match="begun with another --lora and set of source files"):
        convert_folder(dataclasses.replace(task, lora=source.lora), PickledTensors)


# Refused, with nothing written


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
    assert (
        f"the tensor {max(load_index(broken, shard.name))} is not complete" in error or "the tensor" in error
    )
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
    assert (
        "config.json" in error or "diffusion_pytorch_model" in error or "Wan2.2" in error or "wan:" in error
    )


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


# Dry runs


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


def test_every_tensor_of_the_published_size_has_its_place() -> None:
    names = (
        "wan22_s2v_14b_dit", "wan21_vae", "umt5_xxl_encoder", "wav2vec2_large_xlsr53", "liveavatar_lora",
    )  # fmt: skip
    plans = plan_listings([shared_path(f"manifests/{name}.json") for name in names])
    assert [len(plan.mapped) for plan in plans] == [1260, 194, 242, 424, 896]
    assert [plan.component for plan in plans] == ["dit", "vae", "text", "speech", "lora"]
    parameters = [16_295_755_609, 126_892_531, 5_680_910_336, 315_472_545, 676_331_520]
    assert [plan.parameters for plan in plans] == parameters
    for plan in plans:
        assert plan.problems == ()
        assert plan.dropped == ()
