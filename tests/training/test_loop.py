import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.checkpoints.runs import RunCheckpoints, read_average
from lavatar_jax.data.batches import Batches
from lavatar_jax.errors import UserError
from lavatar_jax.parallel import MeshConfig, train_mesh
from lavatar_jax.training.bookkeeping import Bookkeeping, Flight
from lavatar_jax.training.loop import LoopConfig, fit
from lavatar_jax.training.optim import make_optimizer, matrix_axes, schedule
from lavatar_jax.training.state import create_state, make_train_step, split_model


class Net(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (4, width)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ self.weight[...] + self.bias[...])


def setup(width: int = 3):
    params, merge = split_model(Net(width, nnx.Rngs(0)))
    optimizer = make_optimizer(params)

    def loss(params, frozen, batch, key):
        noise = 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean((merge(params)(batch + noise) - 0.5) ** 2), {}

    return create_state(params, optimizer, seed=0), make_train_step(loss, optimizer, 0.9)


def batches():
    data = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    return Batches(lambda part, parts: grain.MapDataset.source(data).shuffle(seed=1).repeat(99).batch(4))


CONFIG = LoopConfig(steps=12, batch=4, log_every=4, warmup=0.1, learning_rate=0.3)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path):
    state, step = setup()
    whole = fit(step, state, {}, batches(), CONFIG, tmp_path / "whole")
    fit(step, setup()[0], {}, batches(), CONFIG, tmp_path / "parts", stop_at=5)
    resumed = fit(step, setup()[0], {}, batches(), CONFIG, tmp_path / "parts")
    for name in ("params", "average", "optimizer", "step", "key"):
        a, b = getattr(whole, name), getattr(resumed, name)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))), name
    assert int(resumed.step) == 12


def test_the_loop_learns_logs_and_leaves_an_average(tmp_path: Path):
    state, step = setup()
    fit(step, state, {}, batches(), CONFIG, tmp_path, evaluate=lambda state: {"psnr": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert lines[-1]["evaluation"]["psnr"] == 1.0
    average = read_average(tmp_path)
    assert sorted(average) == ["bias", "weight"]
    assert average["weight"].shape == (4, 3)


def test_a_signal_ends_a_process_by_itself_after_the_step_that_runs(tmp_path: Path):
    class Interrupting(Batches):
        def __next__(self):
            if self.get_state()["batch"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    state, step = setup()
    feed = batches()
    feed.__class__ = Interrupting
    with pytest.raises(KeyboardInterrupt):
        fit(step, state, {}, feed, CONFIG, tmp_path, evaluate=lambda state: pytest.fail("time is short"))
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_a_measurement_without_room_is_told_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def evaluate(state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 48 GB")

    state, step = setup()
    assert int(fit(step, state, {}, batches(), CONFIG, tmp_path, evaluate=evaluate).step) == 12
    said = " ".join(capsys.readouterr().out.split())
    assert "no measurement at step 12: RESOURCE_EXHAUSTED: Out of memory" in said


def test_where_there_is_no_terminal_lines_tell_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    state, step = setup()
    fit(step, state, {}, batches(), CONFIG, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [line.split("  ")[0] for line in lines] == [
        "step 4 (33.3 %)",
        "step 8 (66.7 %)",
        "step 12 (100.0 %)",
    ]


def test_another_batch_size_of_a_run_that_goes_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state, step = setup()
    fit(step, state, {}, batches(), CONFIG, tmp_path, stop_at=5)
    assert "note" not in capsys.readouterr().out
    fit(step, setup()[0], {}, batches(), dataclasses.replace(CONFIG, batch=2), tmp_path, stop_at=6)
    assert "as many batches as before, of 4 samples then and 2 now" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    state, step = setup()
    fit(step, state, {}, batches(), CONFIG, tmp_path, stop_at=1)
    with pytest.raises(UserError, match="another model"):
        RunCheckpoints(tmp_path / "checkpoints").restore(setup(width=5)[0])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a training run"):
        read_average(tmp_path)


def test_a_step_with_a_bad_batch_changes_no_parameter():
    state, step = setup()
    before = np.asarray(state.params["weight"])
    state, metrics = step(state, {}, jnp.full((4, 4), jnp.nan), jnp.float32(0.1))
    assert not np.isfinite(metrics["grad_norm"])
    np.testing.assert_array_equal(state.params["weight"], before)


def test_muon_sees_kernels_as_input_by_output_and_leaves_the_rest():
    assert matrix_axes("conv.weight", jnp.zeros((3, 3, 3, 4, 8)), ()) == ((0, 1, 2, 3), 4)
    assert matrix_axes("blocks.q.weight", jnp.zeros((6, 4, 8)), ("blocks",)) == ((1,), 2)
    assert matrix_axes("blocks.norm.weight", jnp.zeros((6, 4)), ("blocks",)) is None
    assert matrix_axes("table", jnp.zeros((6, 4)), ()) is None


def test_the_throughput_is_of_all_steps_and_the_samples_that_they_had(monkeypatch: pytest.MonkeyPatch):
    mesh = train_mesh(MeshConfig(data=1))
    run = Bookkeeping(LoopConfig(steps=9, batch=100, log_every=4), 0, 0.0, None, mesh)
    logged: list[dict[str, float]] = []
    run.log = SimpleNamespace(steps=lambda step, done, numbers: logged.append(numbers))  # type: ignore[assignment]
    run._device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3e9})  # type: ignore[assignment]
    for step, now in enumerate((2.0, 4.0, 6.0, 14.0), start=1):
        if step == 2:
            monkeypatch.setattr(time, "perf_counter", lambda: 3.0)
            with run.compiling():  # for clips of another size
                monkeypatch.setattr(time, "perf_counter", lambda: 3.5)
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        run.land(Flight(step, 0.1, {"loss": np.float32(1.0)}, (0.0, 1.0), samples=6, records=None))
    assert logged[0]["samples_per_second"] == pytest.approx(2 * 6 / (2.0 + 8.0)), "of steps 3 and 4"
    assert run.watch.read() == pytest.approx(14.0 - 2.0 - 0.5), "from the first step on, but for the pause"
    assert logged[0]["peak_gb"] == 3.0


def test_the_schedule_rises_stays_and_falls_to_zero():
    assert schedule(0.0, warmup=0.1) == 0.0
    assert schedule(0.05, warmup=0.1) == pytest.approx(0.5)
    assert schedule(0.4, warmup=0.1) == 1.0
    assert schedule(0.75, warmup=0.1) == pytest.approx(0.5)
    assert schedule(1.0, warmup=0.1) == 0.0
