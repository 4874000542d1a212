"""Published folders become model folders, and back: every number, in bounded steps."""

import errno
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lavatar_jax import lora, quant
from lavatar_jax.checkpoints import exporting
from lavatar_jax.checkpoints.conversion import JOURNAL, convert_folder
from lavatar_jax.checkpoints.convert import convert, param_paths
from lavatar_jax.checkpoints.dry_run import plan_folder, plan_listings
from lavatar_jax.checkpoints.lora_keys import merged, read_lora
from lavatar_jax.checkpoints.manifest import hash_file, hash_leaf, read_manifest
from lavatar_jax.checkpoints.orbax_store import restore_component, restore_leaves, stored_leaves
from lavatar_jax.checkpoints.store import load_config
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.config import PAPER, RELEASE_TPP
from lavatar_jax.errors import UserError
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.parallel import MeshConfig, train_mesh
from lavatar_jax.training.weights import LoraConfig, Weights, initial_weights
from tests import published
from tests.checkpoints.conversions import abstract_dit, chunks_of, command, task_of
from tests.published import Published
from tests.shared import shared_path
from tools.convert import main as convert_main
from tools.export_torch import main as export_main
from tools.inspect_checkpoint import main as inspect_main
from tools.pth import PickledTensors


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


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp32"])
@pytest.mark.parametrize("merge", [True, False])
def test_a_dry_run_tells_the_bytes_of_the_result(
    source: Published, tmp_path: Path, dtype: str, merge: bool
) -> None:
    task = task_of(source, tmp_path / "model", lora=source.lora, dtype=dtype, merge=merge)
    planned = {plan.component: plan.nbytes for plan in plan_folder(task, PickledTensors)}
    written = convert_folder(task, PickledTensors).components
    assert planned == {**{name: component.bytes for name, component in written.items()}, "lora": 0}


def test_a_model_is_sampled_as_it_was_asked_for(source: Published, bf16: Path, tmp_path: Path) -> None:
    """Adapters of stage 2 were trained for the paper's sampling, not for the release's."""
    assert load_config(bf16).sampling == RELEASE_TPP
    options = ("--wan", source.wan, "--lora", source.lora, "--preset", "paper", "--out", tmp_path / "model")
    assert command(convert_main, *options) == 0
    assert load_config(tmp_path / "model").sampling == PAPER


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


def test_published_adapters_can_be_trained_further(source: Published, bf16: Path, tmp_path: Path) -> None:
    """From the released file, whose factor is 0.5; here trained with another alpha."""
    options = ("--wan", source.wan, "--lora", source.lora, "--keep-lora", "--out", tmp_path / "model")
    assert command(convert_main, *options) == 0
    config, mesh = published.DIT_CONFIG, train_mesh(MeshConfig(data=1))

    def start(place: Path, rank: int = 4, alpha: float = 1.0) -> Weights:
        adapters = LoraConfig(rank=rank, alpha=alpha, init=str(place))
        make = lambda rngs: CausalDiT(config, rngs=rngs)  # noqa: E731
        return initial_weights(make, mesh, init=str(bf16), seed=0, adapters=adapters)

    stored = restore_leaves(tmp_path / "model/dit", stored_leaves(tmp_path / "model/dit"))
    started = start(tmp_path / "model")
    assert len(started.params) == 2 * sum(name.endswith(".weight.a") for name in stored) > 0
    for name, value in started.params.items():
        wanted = np.asarray(stored[name], np.float32) * (2.0 if name.endswith(".b") else 1.0)
        np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)
    with pytest.raises(UserError, match=r"has adapters of rank 4: give --lora\.rank 4"):
        start(tmp_path / "model", rank=2)
    with pytest.raises(UserError, match="has no adapters of its own: convert it with --lora, --keep-lora"):
        start(bf16)


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
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    assert command(inspect_main, folder) == 2
    assert "config.json" in capsys.readouterr().err
    (folder / "config.json").write_text(config)
    assert command(inspect_main, folder, "--verify") == 2
    assert "vae/decoder.conv_in.weight has other numbers" in capsys.readouterr().err
    chunk.unlink()
    assert command(inspect_main, folder) == 2
    assert str(chunk) in capsys.readouterr().err
    (folder / "manifest.json").unlink()
    assert command(inspect_main, folder) == 2
    assert "manifest.json" in capsys.readouterr().err


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
