"""The loop of every training stage: schedule, progress, log, checkpoints, exact resume, interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lavatar_jax.checkpoints.runs import RunCheckpoints
from lavatar_jax.training.optim import schedule

State = TypeVar("State")  # a registered dataclass with `step` (int32 []) and `seconds` (float32 [])
StepFn = Callable[[State, Any, Any, jax.Array], tuple[State, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast. With `steps` set the schedule counts steps and a run is exactly repeatable;
    otherwise it counts `seconds` of training, which suits a shared machine."""

    seconds: float = 1800.0
    steps: int | None = None
    learning_rate: float = 2e-3  # peak
    warmup: float = 0.03  # part of the run
    weight_decay: float = 0.0
    ema_decay: float = 0.99
    batch: int = 8
    seed: int = 0
    log_every: int = 20  # steps
    checkpoint_seconds: float = 180.0

    def progress(self, step: int, seconds: float) -> float:
        return step / self.steps if self.steps is not None else seconds / self.seconds


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGTERM or the first Ctrl-C sets; a second Ctrl-C interrupts at once."""
    event = threading.Event()

    def stop(signum: int, frame: Any) -> None:
        if event.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fit(
    step_fn: StepFn[State],
    state: State,
    frozen: Any,
    batches: grain.DatasetIterator,
    config: LoopConfig,
    out: Path,
    *,
    evaluate: Callable[[State], dict[str, float]] | None = None,
    stop_at: int | None = None,
) -> State:
    """Train until the schedule ends, an interruption, or step `stop_at`; return the last state.

    `step_fn(state, frozen, batch, learning_rate) -> (state, metrics)`, jitted; metrics hold `loss`.
    `frozen` is a pytree of what is not trained: an argument of the step, no part of checkpoints.

    Starts from the newest checkpoint in `out/checkpoints` when there is one, with the data iterator where it
    was. Writes `out/log.jsonl` (one object every `log_every` steps) and checkpoints at intervals and at the
    end; `evaluate` runs with each checkpoint and its numbers go to the log.
    Raises UserError when `out` holds a checkpoint of another model.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = RunCheckpoints(out / "checkpoints")
    state, restored = checkpoints.restore(state)
    if restored is not None:
        batches.set_state(restored)
    step, seconds = int(state.step), float(state.seconds)

    def save(state: State, log: Any) -> None:
        checkpoints.save(dataclasses.replace(state, seconds=jnp.float32(seconds)), batches.get_state())
        if evaluate is not None:
            numbers = {"step": step, "seconds": round(seconds, 1), **evaluate(state)}
            log.write(json.dumps({"evaluation": numbers}) + "\n")
            log.flush()

    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        interruption() as interrupted,
        open(out / "log.jsonl", "a") as log,
        Progress(*columns) as bar,
    ):
        task = bar.add_task("", total=1.0, step=step, status="compiling")
        saved_at, compiled, window = seconds, False, []
        while (done := config.progress(step, seconds)) < 1.0 and not interrupted.is_set() and step != stop_at:
            start = time.perf_counter()
            rate = config.learning_rate * schedule(done, warmup=config.warmup)
            batch = jax.tree.map(jnp.asarray, next(batches))
            state, metrics = step_fn(state, frozen, batch, jnp.float32(rate))
            metrics = jax.device_get(metrics)  # waits for the step
            elapsed = time.perf_counter() - start
            step += 1
            if compiled:  # the first step compiles; its time is not training time
                seconds += elapsed
            compiled = True
            window.append((elapsed, metrics))
            if step % config.log_every == 0:
                record = summary(window, config.batch)
                window = []
                line = {"step": step, "seconds": round(seconds, 1), "rate": rate, **record}
                log.write(json.dumps(line) + "\n")
                log.flush()
                status = f"loss {record['loss']:.4f}  {record['samples_per_second']:.1f} samples/s"
                bar.update(task, completed=done, step=step, status=status)
            if seconds - saved_at >= config.checkpoint_seconds:
                save(state, log)
                saved_at = seconds
        bar.update(task, completed=config.progress(step, seconds), step=step, status="saving")
        save(state, log)
    checkpoints.close()
    return state


def summary(window: list[tuple[float, dict[str, np.ndarray]]], batch: int) -> dict[str, float]:
    """Means of the metrics over the last steps, and the throughput (median, robust to a compiling step)."""
    means = {name: float(np.mean([metrics[name] for _, metrics in window])) for name in window[0][1]}
    return {**means, "samples_per_second": batch / float(np.median([elapsed for elapsed, _ in window]))}
