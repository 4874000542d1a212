"""What the loop does about bad batches, which checkpoints it keeps, and what adapters leave alone."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lavatar_jax.checkpoints.runs import CheckpointConfig, RunCheckpoints, read_average
from lavatar_jax.errors import UserError
from lavatar_jax.training.bad_steps import SPIKES_FROM, BadSteps, Usual, judge
from lavatar_jax.training.logs import read_log
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.weights import LoraConfig
from tests.training.toy_run import BATCH, Batches, begin, losses, mesh_of, train

LOOP = LoopConfig(learning_rate=0.01, warmup=0.0, batch=BATCH)


@pytest.fixture(scope="module")
def step_fn() -> Any:
    return begin(mesh_of(1, 1, 1), spike=3.0)[0]


def fresh(step_fn: Any) -> Any:
    _, state, frozen = begin(mesh_of(1, 1, 1), spike=3.0)
    return step_fn, state, frozen


def spoil(number: int, value: float) -> Any:
    def poison(taken: int, batch: dict[str, Any]) -> None:
        if taken == number:
            batch["x"][3] = value

    return poison


def test_a_bad_batch_is_skipped_and_its_records_are_named(step_fn: Any, tmp_path: Path):
    batches = Batches(spoil(1, np.nan))
    state = train(tmp_path, 3, mesh_of(1, 1, 1), batches=batches, loop=LOOP, begun=fresh(step_fn))
    assert int(state.step) == 3
    assert all(np.isfinite(value).all() for value in state.params.values())
    (bad,) = [line["bad_step"] for line in read_log(tmp_path / "log.jsonl") if "bad_step" in line]
    assert bad["step"] == 2
    assert "records 100, 101, 102, 103, 104, 105, 106, 107" in bad["message"]
    assert len(losses(tmp_path)) == 2, "its loss is no part of the log"


def test_a_bad_batch_stops_the_run_if_told_to_and_it_can_go_on(step_fn: Any, tmp_path: Path):
    loop = dataclasses.replace(LOOP, on_bad_step="stop")
    options: dict[str, Any] = {"batches": Batches(spoil(1, np.inf)), "loop": loop}
    with pytest.raises(UserError, match=r"step 2 was skipped.* records 100, .*--train.on-bad-step skip"):
        train(tmp_path, 5, mesh_of(1, 1, 1), begun=fresh(step_fn), **options)
    assert all(np.isfinite(value).all() for value in read_average(tmp_path).values())
    state = train(tmp_path, 5, mesh_of(1, 1, 1), begun=fresh(step_fn), **options)
    assert int(state.step) == 5


def test_a_jump_of_the_loss_is_bad_once_it_is_known_what_is_usual():
    usual = Usual.unknown()
    for step in range(SPIKES_FROM):
        good, usual = judge(usual, np.float32(1.0 + 0.1 * (step % 2)), np.float32(1.0), 3.0)
        assert good
    assert abs(float(usual.loss) - 1.05) < 0.02
    for loss, norm, expected in ((2.9, 1.0, True), (3.5, 1.0, False), (1.0, np.inf, False)):
        good, after = judge(usual, np.float32(loss), np.float32(norm), 3.0)
        assert bool(good) is expected
        assert (float(after.loss) == float(usual.loss)) is not expected
    assert judge(usual, np.float32(1000.0), np.float32(1.0), 0.0)[0], "without a limit none is a spike"


def test_skipping_ends_when_nothing_is_good_any_more():
    bad = BadSteps("skip")
    for step in range(20):
        assert not bad.should_stop()
        complaint = bad.check(step, {"loss": np.nan}, None)
    assert bad.should_stop()
    assert "20 bad steps in a row" in str(bad.error(complaint or ""))


def test_a_student_that_never_learns_is_noticed_though_its_critic_does():
    bad = BadSteps("skip")
    for step in range(99):
        turn = step % 5 == 4
        bad.check(step, {"loss": 1.0, "bad": float(turn), "student_turn": float(turn)}, None)
        assert not bad.should_stop()
    bad.check(99, {"loss": 1.0, "bad": 1.0, "student_turn": 1.0}, None)
    assert bad.should_stop()
    bad.check(104, {"loss": 1.0, "bad": 0.0, "student_turn": 1.0}, None)
    assert not bad.should_stop()


def test_critics_that_fail_now_and_then_are_no_row():
    """One step in 40, none of which is the student's turn, as while the critic warms up."""
    bad = BadSteps("skip")
    for step in range(2000):
        bad.check(step, {"loss": 1.0, "bad": float(step % 40 == 0), "student_turn": 0.0}, None)
        assert not bad.should_stop()
    assert bad.total == 50
    for step in range(20):
        assert not bad.should_stop()
        bad.check(step, {"loss": 1.0, "bad": 1.0, "student_turn": 0.0}, None)
    assert bad.should_stop()


def test_every_nth_checkpoint_is_written_and_kept(step_fn: Any, tmp_path: Path):
    config = CheckpointConfig(keep=1, every=2)
    train(
        tmp_path, 5, mesh_of(1, 1, 1), loop=LOOP, begun=fresh(step_fn), save_seconds=1e6, checkpoint=config
    )  # fmt: skip
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", config)
    assert list(checkpoints.manager.all_steps()) == [2, 4, 5]
    checkpoints.close()


def test_the_newest_and_the_best_checkpoint_are_kept(step_fn: Any, tmp_path: Path):
    quality = {0: 9.0, 1: 1.0, 2: 5.0, 3: 2.0, 4: float("nan"), 5: 3.0}
    config = CheckpointConfig(keep=2, best="quality")
    train(
        tmp_path, 5, mesh_of(1, 1, 1), loop=LOOP, begun=fresh(step_fn), save_seconds=0.0, checkpoint=config,
        evaluate=lambda state: {"quality": quality[int(state.step)]},
    )  # fmt: skip
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", config)
    assert list(checkpoints.manager.all_steps()) == [2, 4, 5]
    assert checkpoints.best_step() == 2
    expected = checkpoints.read(2)[".average['inner.weight']"]
    checkpoints.close()
    assert not np.array_equal(read_average(tmp_path)["inner.weight"], expected)
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": dataclasses.asdict(config)}))
    np.testing.assert_array_equal(read_average(tmp_path)["inner.weight"], expected)


@pytest.mark.parametrize(
    ("measured", "message"),
    [({}, "no such number is measured, only step_again"), ({"evaluate": None}, "stages 1 and 2 do")],
)
def test_a_best_number_that_nothing_measures_is_refused_before_the_first_step(
    step_fn: Any, tmp_path: Path, measured: dict[str, Any], message: str
):
    batches = Batches()
    with pytest.raises(UserError, match=message):
        train(
            tmp_path, 1, mesh_of(1, 1, 1), loop=LOOP, begun=fresh(step_fn), batches=batches,
            checkpoint=CheckpointConfig(best="psnr"), **measured,
        )  # fmt: skip
    assert batches.taken == 0


def test_a_best_number_that_is_measured_no_more_costs_no_training(step_fn: Any, tmp_path: Path):
    def evaluate(state: Any) -> dict[str, float]:  # as when the held-out records cannot be read any more
        step = int(state.step)
        return {"quality": 2.0, "other": 1.0} if step == 2 else {"quality": 1.0} if step < 2 else {}

    config = CheckpointConfig(keep=1, best="quality")
    train(
        tmp_path, 4, mesh_of(1, 1, 1), loop=LOOP, begun=fresh(step_fn), save_seconds=0.0, checkpoint=config,
        evaluate=evaluate,
    )  # fmt: skip
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", config)
    assert list(checkpoints.manager.all_steps()) == [2, 4]
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_adapters_train_and_nothing_else_is_kept(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    step_fn, state, frozen = begin(mesh, dit=True, lora=LoraConfig(rank=2, alpha=4.0), precision="bfloat16")
    assert all(name.endswith((".weight.a", ".weight.b")) for name in state.params)
    assert "blocks.self_attn.q.weight.b" in state.params
    assert frozen["blocks.self_attn.q.weight.base"].dtype == jax.numpy.bfloat16
    assert frozen["head.linear.weight"].dtype == jax.numpy.float32
    assert {leaf.size for leaf in jax.tree.leaves(state.optimizer)} <= {
        1, *(value.size for value in state.params.values())
    }  # fmt: skip
    start = {name: np.asarray(value) for name, value in state.params.items()}
    begun = step_fn, state, frozen
    state = train(tmp_path, 3, mesh, loop=LOOP, begun=begun, batches=Batches(dit=True))
    for name, value in state.params.items():
        assert value.dtype == np.float32
        assert not np.array_equal(value, start[name]), name
    assert sorted(read_average(tmp_path)) == sorted(state.params)
    found = losses(tmp_path)
    assert len(found) == 3
    assert np.isfinite(found).all()


def test_logs_of_a_repeated_step_are_read_once(tmp_path: Path):
    lines = [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2},
        {"evaluation": {"step": 2}},
        {"step": 2, "loss": 3},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo'
    (tmp_path / "log.jsonl").write_text(text)
    assert list(read_log(tmp_path / "log.jsonl")) == [lines[0], lines[3]]


def test_a_long_log_is_read_once_through(tmp_path: Path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(20_000)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, *lines[10_000:]]))
    start = time.process_time()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == list(range(20_000))
    assert time.process_time() - start < 5  # a look back for each line would take a minute
