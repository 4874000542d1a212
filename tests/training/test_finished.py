"""A run's folder says what it trained, also after a run that was refused; adapters come back merged."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from lavatar_jax import lora
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.runs import CheckpointConfig
from lavatar_jax.config import SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.files import lock_folder
from lavatar_jax.training import stages
from lavatar_jax.training.decoder import load_dit
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.distill import starting_weights
from lavatar_jax.training.latents import LatentsConfig, load_vae
from lavatar_jax.training.logs import LogConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.run import Run, fit_run
from lavatar_jax.training.weights import LoraConfig
from tests.tiny import random_dit, random_vae, tiny_config, tiny_vae_config
from tests.training.finished_run import random_adapters, write_run
from tests.training.toy_run import Batches, begin, mesh_of
from train import load_config

CONFIG = tiny_config()
LORA = LoraConfig(rank=2, alpha=3.0)


@pytest.fixture
def base(tmp_path: Path) -> DiTRun:
    """A run that trained all weights."""
    run = DiTRun(
        out=str(tmp_path / "dit"), model=CONFIG, data=LatentsConfig(), loss=ForcingConfig(),
        sampling=SamplingConfig(), train=LoopConfig(),
    )  # fmt: skip
    write_run(run, param_paths(random_dit(CONFIG)))
    return run


def adapted(base: DiTRun) -> DiTRun:
    return dataclasses.replace(base, out=base.out + "-lora", init=base.out, lora=LORA)


def test_a_refused_run_leaves_the_config_of_the_one_that_is_there(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    log, loop = LogConfig(tensorboard=False, report=False), LoopConfig(steps=1, learning_rate=0.5)
    run = Run(out=str(tmp_path / "run"), train=loop, log=log)
    fit_run(run, *begin(mesh), Batches(), mesh)
    written = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(written)["train"]["learning_rate"] == 0.5
    other = dataclasses.replace(run, train=dataclasses.replace(loop, learning_rate=0.25))
    with pytest.raises(UserError, match="is of another model"):
        fit_run(other, *begin(mesh, dit=True), Batches(dit=True), mesh)
    assert (tmp_path / "run" / "config.json").read_text() == written
    fit_run(other, *begin(mesh), Batches(), mesh)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["learning_rate"] == 0.25


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    log = LogConfig(tensorboard=False, report=False)
    run = Run(out=str(tmp_path / "run"), train=LoopConfig(steps=1), log=log)
    with (
        contextlib.closing(lock_folder(Path(run.out))),
        pytest.raises(UserError, match=r"another process is writing to .*run; wait for it to end"),
    ):
        fit_run(run, *begin(mesh), Batches(), mesh)
    assert [path.name for path in Path(run.out).iterdir()] == [".lock"]
    for _ in range(2):  # a run that has ended keeps nobody out
        fit_run(run, *begin(mesh), Batches(), mesh)


def test_the_command_writes_no_config_before_the_run_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(config: DiTRun) -> None:
        raise UserError("no")

    monkeypatch.setattr(stages, "train", refuse)
    config = Path(__file__).resolve().parents[2] / "configs" / "tiny_vae.py"
    with pytest.raises(UserError, match="no"):
        train.main([str(config), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_config_of_another_model_is_refused(base: DiTRun, tmp_path: Path):
    for wider in (tiny_config(ffn_width=32), tiny_config(use_pose=True)):
        (Path(base.out) / "config.json").write_text(
            json.dumps(dataclasses.asdict(dataclasses.replace(base, model=wider)))
        )
        with pytest.raises(UserError, match=r"dit is not of the model of its config\.json \(\d+ differences"):
            load_dit(base.out)
    config = tiny_vae_config()
    run = Run(out=str(tmp_path / "vae"), train=LoopConfig())
    write_run(run, param_paths(random_vae(config)))
    for values in (config, dataclasses.replace(config, width=8)):
        (tmp_path / "vae" / "config.json").write_text(json.dumps({"model": dataclasses.asdict(values)}))
        if values is config:
            assert load_vae(run.out)[0] == config
            continue
        with pytest.raises(UserError, match=r"vae is not of the model of its config\.json"):
            load_vae(run.out)


def test_adapters_come_back_merged_into_what_they_were_trained_on(base: DiTRun):
    run = adapted(base)
    adapters = random_adapters(run.make, LORA)
    write_run(run, adapters)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), random_dit(CONFIG))
    whole = lora.add_adapters(half, jax.random.key(0), rank=2, alpha=3.0)
    expected = param_paths(lora.merge(lora.join_adapters(adapters, lora.split_adapters(whole)[1])))
    found = param_paths(load_dit(run.out))
    original = param_paths(random_dit(CONFIG))
    assert found.keys() == original.keys()
    name = "blocks.ffn.inner.weight"
    assert np.abs(found[name] - original[name]).mean() > 0.05
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["head.linear.weight"], original["head.linear.weight"])
    assert {x.dtype.name for x in found.values()} == {"float32"}


def test_what_reads_a_run_takes_the_best_checkpoint_where_it_is_kept(base: DiTRun):
    kept = CheckpointConfig(keep=1, best="held_out_flow", best_mode="min")
    half, last = (dict(param_paths(random_dit(CONFIG, seed=seed))) for seed in (1, 2))
    name = "blocks.ffn.inner.weight"
    for checkpoint, expected in ((CheckpointConfig(keep=1), last), (kept, half)):
        run = dataclasses.replace(base, out=f"{base.out}-{checkpoint.best}", checkpoint=checkpoint)
        write_run(run, half, step=1, metrics={"held_out_flow": 1.0})
        write_run(run, last, step=2, metrics={"held_out_flow": 2.0})
        np.testing.assert_array_equal(param_paths(load_dit(run.out))[name], expected[name])
        stage2 = dataclasses.replace(
            load_config("configs/tiny_distill.py"), model=CONFIG, init=run.out, teacher=run.out
        )
        for weights in starting_weights(stage2, mesh_of(1, 1, 1)):
            np.testing.assert_array_equal(weights[name], expected[name])


def test_adapters_without_their_base_are_refused(base: DiTRun):
    run = adapted(base)
    write_run(run, random_adapters(run.make, LORA))
    for init, message in (
        (None, r"dit-lora has adapters on random weights"),
        ("runs/gone", r"dit-lora has adapters on runs/gone, which cannot be read: runs/gone: no such model"),
        (run.out, r"dit-lora has adapters on .*, which cannot be read: .* holds weights of another model"),
    ):
        changed = dataclasses.asdict(dataclasses.replace(run, init=init))
        (Path(run.out) / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_dit(run.out)
