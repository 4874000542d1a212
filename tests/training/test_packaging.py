"""A run that trained all of a Wan-shaped transformer becomes a model folder, like the one it is based on."""

import contextlib
import dataclasses
import errno
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lavatar_jax.checkpoints.conversion import JOURNAL, Task, convert_folder
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.manifest import read_manifest
from lavatar_jax.checkpoints.orbax_store import restore_leaves, stored_leaves
from lavatar_jax.checkpoints.runs import CheckpointConfig, RunAverage, RunCheckpoints
from lavatar_jax.checkpoints.store import load_config, load_model_folder
from lavatar_jax.config import PAPER, RELEASE_TPP
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.errors import UserError
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.distill import DistillRun
from lavatar_jax.training.distill_step import DistillConfig
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.run import write_config
from lavatar_jax.training.scores import ScoreConfig
from lavatar_jax.training.self_forcing import SelfForcingConfig
from lavatar_jax.training.weights import LoraConfig
from tests import published
from tests.checkpoints.conversions import command, contents
from tests.published import Published, write_published
from tests.tiny import random_dit
from tests.training.finished_run import write_run
from tools.convert import main as convert_main
from tools.export_torch import main as export_main
from tools.inspect_checkpoint import main as inspect_main
from tools.package_model import main
from tools.pth import PickledTensors

MODEL = dataclasses.replace(published.DIT_CONFIG, attention="chunked")  # as training computes it
DATA = LatentsConfig(folder="no/records")
TRAINED = param_paths(random_dit(MODEL, seed=1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return write_published(tmp_path_factory.mktemp("published"), pickled=False)


@pytest.fixture(scope="module")
def base(source: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("base") / "wan")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 2, after 7 steps, whose records are not there."""
    run = DistillRun(
        out=str(tmp_path_factory.mktemp("runs") / "run"), model=MODEL, data=DATA, sampling=PAPER,
        rollout=SelfForcingConfig(), score=ScoreConfig(), loss=DMDConfig(), dyna=DynaConfig(),
        distill=DistillConfig(), train=LoopConfig(),
    )  # fmt: skip
    return write_run(run, TRAINED, step=7)


def convert(source: Published, out: Path, **options: Any) -> Path:
    convert_folder(Task(wan=source.wan, out=out, **options), PickledTensors)
    return out


def forcing(out: Path, **changes: Any) -> DiTRun:
    run = DiTRun(
        out=str(out), model=MODEL, data=DATA, loss=ForcingConfig(), sampling=PAPER, train=LoopConfig()
    )
    return dataclasses.replace(run, **changes)


def stored_dit(folder: Path) -> dict[str, np.ndarray]:
    leaves = restore_leaves(folder / "dit", stored_leaves(folder / "dit"))
    return {name: np.asarray(value) for name, value in leaves.items()}


def check_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], dtype: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], np.asarray(value).astype(dtype), strict=True, err_msg=name)


def test_a_student_becomes_a_model_with_the_rest_of_its_base(
    base: Path, student: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "mine"
    wan = shutil.copytree(base, tmp_path / "wan")
    before = contents(wan)
    assert command(main, "--base", wan, "--dit", student, "--out", out) == 0
    assert contents(wan) == before
    shutil.rmtree(wan)  # the new folder stands alone

    check_equal(stored_dit(out), TRAINED, ml_dtypes.bfloat16)
    rest, wanted = (
        {name: x for name, x in files.items() if name.split("/")[0] in ("vae", "text", "speech", "tokenizer")}
        for files in (contents(out), before)
    )
    assert rest == wanted
    then = load_config(base)
    assert then.sampling == RELEASE_TPP
    assert load_config(out) == dataclasses.replace(then, name="mine", sampling=PAPER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]

    check_equal(param_paths(load_model_folder(out).dit), TRAINED, ml_dtypes.bfloat16)
    assert command(inspect_main, out, "--verify") == 0
    assert f"the transformer from {student}, step 7" in " ".join(capsys.readouterr().out.split())
    assert command(export_main, out, "--out", tmp_path / "torch") == 0
    assert command(convert_main, "--wan", tmp_path / "torch", "--out", tmp_path / "again") == 0
    assert read_manifest(tmp_path / "again").components == read_manifest(out).components


def test_a_run_that_learned_nothing_gives_the_base_again(
    source: Published, base: Path, tmp_path: Path
) -> None:
    """Chunk for chunk, at its best checkpoint: in the base's 8 bits, and in the dtype that is asked for."""
    small = convert(source, tmp_path / "fp8", dtype="fp8", per_channel=True)
    kept = CheckpointConfig(keep=1, best="held_out_flow", best_mode="min")
    run = forcing(tmp_path / "run", checkpoint=kept)
    same = {name: value.astype(np.float32) for name, value in stored_dit(base).items()}
    for step, params in enumerate((same, TRAINED), 1):
        write_run(run, params, step=step, metrics={"held_out_flow": float(step)})
    for options, wanted in (((), small), (("--dtype", "bf16"), base)):
        out = tmp_path / f"out-{wanted.name}"
        assert command(main, "--base", small, "--dit", run.out, "--out", out, "--name", "same", *options) == 0
        assert contents(out / "dit") == contents(wanted / "dit")
        assert load_config(out) == dataclasses.replace(load_config(small), name="same")
        manifest = read_manifest(wanted)
        trained = f"{run.out}, step 1"
        assert read_manifest(out) == dataclasses.replace(manifest, trained=trained)


def test_an_interrupted_call_goes_on_with_one_parameter_at_a_time(
    base: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Also where files cannot be linked."""
    out = tmp_path / "mine"
    package = ("--base", base, "--dit", student, "--out", out)
    load, asked = RunCheckpoints.load, []

    def watched(self: RunCheckpoints, step: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(*arguments)
        return load(self, step, arguments)

    def no_links(file: Path, place: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def stop(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunCheckpoints, "load", watched)
    with monkeypatch.context() as patch:
        patch.setattr("os.link", no_links)
        patch.setattr("os.replace", stop)
        assert command(main, *package) == 130
    assert sorted(asked) == sorted(f".average['{name}']" for name in TRAINED)
    assert not out.exists()
    growing = tmp_path / "mine.partial"
    files = contents(growing)
    assert command(main, *package, "--dtype", "fp32") == 2
    assert "mine.partial was begun with another --dtype" in capsys.readouterr().err
    assert command(main, *package) == 0
    assert not growing.exists()
    files.pop(JOURNAL)
    assert contents(out) == files
    check_equal(stored_dit(out), TRAINED, ml_dtypes.bfloat16)


def test_a_checkpoint_that_training_removes_is_named(student: Path, tmp_path: Path) -> None:
    run = shutil.copytree(student, tmp_path / "run")
    with contextlib.closing(RunAverage(run)) as average:
        shutil.rmtree(run / "checkpoints/7")
        with pytest.raises(UserError, match=r"checkpoints/7 was removed while it was read"):
            average.read("head.linear.weight")


def test_what_cannot_be_a_model_is_one_line(
    base: Path, student: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where another test asked for orbax's log, it goes to a stream that has been closed since.
    monkeypatch.setattr(logging.getLogger("absl"), "disabled", True)
    adapters = forcing(tmp_path / "adapters", lora=LoraConfig(rank=2))
    other = forcing(tmp_path / "other", model=dataclasses.replace(MODEL, layers=3, text_dim=8))
    fresh = forcing(tmp_path / "fresh")
    with ShardWriter(tmp_path / "records") as writer:
        writer.finish(mean=np.zeros(16), std=np.ones(16), encoder={})
    scaled = forcing(tmp_path / "scaled", data=LatentsConfig(folder=str(tmp_path / "records")))
    for run in (adapters, other, fresh, scaled):
        write_config(run)
        (Path(run.out) / "checkpoints").mkdir()
    right = {"--base": base, "--dit": student, "--out": tmp_path / "out"}
    for change, message in (
        (
            {"--dit": adapters.out},
            f"trained adapters: make a file of them (tools/export_lora.py {adapters.out}",
        ),
        ({"--dit": other.out}, f"transformer than that of {base}: layers is 3, not 4; text_dim is 8, not 24"),
        ({"--dit": scaled.out}, f"trained on latents with other statistics than those of {base}"),
        ({"--dit": fresh.out}, "no checkpoint in"),
        ({"--dit": base}, f"{base / 'config.json'} tells of no transformer"),
        ({"--dit": tmp_path / "no"}, "config.json is missing"),
        ({"--base": tmp_path / "no"}, "no such model folder"),
        ({"--base": student}, "the model folder lacks this file"),
        ({"--base": "tiny"}, "tiny is a small model, not a converted one: give --vae tiny instead of --base"),
        ({"--out": tmp_path}, f"{tmp_path} exists already"),
        ({"--vae": base}, "give either --vae (of a small model) or --base (of a large one)"),
        ({"--base": None}, "give either --vae"),
        ({"--base": None, "--vae": base, "--dtype": "bf16"}, "--dtype goes with --base"),
    ):
        options = [word for pair in (right | change).items() if pair[1] for word in pair]
        assert command(main, *options) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
