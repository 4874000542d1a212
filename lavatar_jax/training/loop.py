"""The loop of every training stage: schedule, checkpoints, exact resume, interruption, bad batches."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavatar_jax.checkpoints.runs import CheckpointConfig, RunCheckpoints
from lavatar_jax.errors import UserError
from lavatar_jax.parallel import (
    MeshConfig,
    batch_part,
    batch_shards,
    put_batch,
    put_everywhere,
    put_tree,
    sharded_training,
    state_shardings,
    train_mesh,
)
from lavatar_jax.training.bookkeeping import Bookkeeping, Flight, LoopConfig
from lavatar_jax.training.distributed import Agreement, ending_together, first_line
from lavatar_jax.training.logs import LogConfig, RunLog
from lavatar_jax.training.optim import Schedule, schedule
from lavatar_jax.training.report import SAMPLES
from lavatar_jax.training.state import release

__all__ = ["LoopConfig", "fit"]


class Resumable(Protocol):
    """A registered dataclass that counts steps (int32 []) and seconds of training (float32 [])."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def step(self) -> jax.Array: ...

    @property
    def seconds(self) -> jax.Array: ...


class Feed(Protocol):
    """Endless batches that are gone on with exactly; `data.batches.Batches` is one."""

    def take_part(self, part: int, parts: int) -> None:
        """From now on only one of equal parts of every batch, in the order of the rows."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


State = TypeVar("State", bound=Resumable)
StepFn = Callable[[State, Any, Any, jax.Array], tuple[State, dict[str, jax.Array]]]


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


def check_batch(config: LoopConfig, mesh: Mesh) -> None:
    """Raises UserError when samples of a step cannot be shared evenly, in every part of an accumulation."""
    shards, parts = batch_shards(mesh), config.accumulate
    if config.batch % (shards * parts):
        raise UserError(
            f"--train.batch {config.batch} cannot be split evenly over {shards} (data x fsdp) devices"
            + (f" in {parts} equal parts" if parts > 1 else "")
            + f": choose a multiple of {shards * parts}, or another --mesh.data"
        )


def _devices(mesh: Mesh) -> str:
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return (
        f"training on {mesh.size} of {jax.device_count()} devices, {kind} ({shape}); "
        f"{jax.local_device_count()} in this process, processes: {jax.process_count()}"
    )


def fit(
    step_fn: StepFn[State],
    state: State,
    frozen: Any,
    batches: Feed,
    config: LoopConfig,
    out: Path,
    *,
    checkpoint: CheckpointConfig | None = None,
    log: LogConfig | None = None,
    optim_schedule: Schedule = "linear",
    mesh: Mesh | None = None,
    evaluate: Callable[[State], dict[str, float]] | None = None,
    sample: Callable[[State, Path], None] | None = None,
    sample_every: float = 0.0,
    flops: float | None = None,
    stop_at: int | None = None,
    accepted: Callable[[], None] | None = None,
) -> State:
    """Train until the schedule ends, or step `stop_at`; return the last state.

    Starts from the newest checkpoint in `out/checkpoints` when there is one, with the data iterator where it
    was, on whatever mesh there is now. Writes logs (`RunLog`), and checkpoints at intervals and at the end.

    Args:
        step_fn: `(state, frozen, batch, learning_rate) -> (state, metrics)`; metrics are scalars, one is
            `loss`. It is compiled here, with the state split as `parallel.state_shardings` says and donated.
        state: a registered dataclass with `step` and `seconds`.
        frozen: a pytree of what is not trained: an argument of the step, no part of checkpoints.
        batches: dicts of numpy arrays [B, ...], of which each process takes the part that its devices need;
            `record` [B] names the samples.
        mesh: axes (data, fsdp, tensor), see `parallel.train_mesh`; None: one device.
        evaluate: runs with each checkpoint; its numbers go to the log, and one may choose the best. Then it
            runs before the first step too, to see that there is such a number.
        sample: writes pictures or videos of a state into a folder, for the report. All processes call it, as
            they do `evaluate`, to compute together; a process may fail alone only after that.
        sample_every: seconds of training from one sample to the checkpoint that takes the next.
        flops: of a step on all devices, for the MFU.
        accepted: runs once it is sure that the run can go on from what is in `out`.

    Raises UserError when `out` holds a checkpoint of another model, when batches do not fit the mesh, when
    nothing measures what is to choose the best checkpoint, and when a bad step is to stop the run. Raises
    KeyboardInterrupt after an interruption (in any process), when all is saved.
    """
    mesh = train_mesh(MeshConfig(data=1), jax.devices()[:1]) if mesh is None else mesh
    check_batch(config, mesh)
    best = checkpoint.best if checkpoint is not None else None
    if best is not None and evaluate is None:
        raise UserError(
            f"--checkpoint.best {best}: this run measures nothing; stages 1 and 2 do where they hold records "
            "out (--samples.records), and stage 0 on videos"
        )
    batches.take_part(*batch_part(mesh))
    checkpoints = RunCheckpoints(out / "checkpoints", checkpoint)
    shardings = state_shardings(state, mesh)
    state, place = put_tree(state, shardings), None
    if checkpoints.newest() is not None:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        release(state)  # there may not be room for two
        state, place = checkpoints.restore(shapes)
    if place is not None:
        batches.set_state(place)
    if best is not None and evaluate is not None and best not in (numbers := evaluate(state)):
        names = ", ".join(numbers) or "nothing"
        raise UserError(f"--checkpoint.best {best}: no such number is measured, only {names}")
    if accepted is not None:
        accepted()
    frozen = put_tree(frozen, state_shardings(frozen, mesh))
    jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    programs: dict[Any, jax.stages.Compiled] = {}
    run = Bookkeeping(config, int(state.step), float(state.seconds), flops, mesh)
    agree = Agreement(mesh)
    pending: Flight | None = None
    saved_step, sampled_at = -1, -math.inf

    def compiled(placed: Any, *arguments: Any) -> jax.stages.Compiled:
        """The step's program for a batch of this shape: clips of another size have one of their own."""
        leaves, structure = jax.tree.flatten(placed)
        kind = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if kind not in programs:
            begun = time.perf_counter()
            with run.compiling():
                programs[kind] = jitted.lower(*arguments).compile()
            run.log.compiled(run.step, time.perf_counter() - begun, programs[kind], mesh.size)
        return programs[kind]

    @contextlib.contextmanager
    def worth_less_than_training(what: str) -> Iterator[None]:
        """What fails here is told: there may be no memory for it. Several processes end instead: some may not
        have failed, and would wait for the others."""
        try:
            yield
        except (OSError, UserError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and not agree.alone:
                raise
            run.log.say(f"no {what} at step {run.step}: {first_line(error)}")

    def measured(state: State) -> dict[str, float] | None:
        numbers = None
        if evaluate is not None:
            with worth_less_than_training("measurement"):
                numbers = evaluate(state)
        if numbers is not None:
            run.log.evaluation(run.step, run.seconds, numbers)
        return numbers

    def told_to_stop() -> bool:
        """By a signal: several processes agree on a step, which takes some; one by itself stops at once."""
        run.stopping = run.stopping or (agree.alone and interrupted.is_set())
        return run.stopping

    def save() -> None:
        nonlocal saved_step, sampled_at
        saved_step = run.step
        run.saved()
        with jax.transfer_guard("allow"), sharded_training(None), run.paused():
            whole = dataclasses.replace(state, seconds=put_everywhere(np.float32(run.seconds), mesh))
            run.log.saving(run.step, run.done)
            data = {**batches.get_state(), "of": config.batch}
            if best is None:  # first of all
                checkpoints.save(whole, data, None)
            numbers = None if run.stopping and run.done < 1.0 else measured(whole)
            if best is not None:
                checkpoints.save(whole, data, numbers)
            if best is not None and best not in (numbers or {}):  # as where records can no longer be read
                run.log.say(f"{best} was not measured at step {run.step}, which cannot be the best")
            due = run.done >= 1.0 or run.seconds >= sampled_at + sample_every
            if sample is not None and due and (run.done >= 1.0 or not told_to_stop()):
                sampled_at = run.seconds
                folder = out / SAMPLES / f"{run.step:08d}"
                with contextlib.suppress(OSError):  # all processes must come to `sample`; it will say so
                    folder.mkdir(parents=True, exist_ok=True)
                with worth_less_than_training("samples"):
                    sample(whole, folder)
            run.log.report()

    with (
        ending_together(lambda: run.step),
        interruption() as interrupted,
        RunLog(out, log or LogConfig()) as run.log,
        sharded_training(mesh),
        jax.transfer_guard("disallow"),
    ):
        run.log.say(_devices(mesh))
        if place is not None and place.get("of", config.batch) != config.batch:
            run.log.say(
                f"note: the data goes on after as many batches as before, of {place['of']} samples then and "
                f"{config.batch} now: some are repeated or left out"
            )
        while run.done < 1.0 and not told_to_stop() and run.step != stop_at:
            batch = next(batches)
            rate = config.learning_rate * schedule(run.done, warmup=config.warmup, kind=optim_schedule)
            run.log.profile(run.step)
            placed = put_batch(batch, mesh)
            samples = len(jax.tree.leaves(placed)[0])
            arguments = state, frozen, placed, put_everywhere(np.float32(rate), mesh)
            state, metrics = compiled(placed, *arguments)(*arguments)
            run.step += 1
            records = batch.get("record") if isinstance(batch, dict) else None
            landed, pending = (
                pending,
                Flight(
                    run.step, rate, metrics, agree(interrupted.is_set(), run.watch.read()), samples, records
                ),
            )
            if landed is not None:  # the one before: the devices have the next to work on meanwhile
                run.land(landed)
            if run.checkpoint_due or checkpoints.stays(run.step):
                run.land(pending)
                pending = None
                save()
        if pending is not None:
            run.land(pending)
        if run.step != saved_step:
            save()
        checkpoints.close()
        stopped = run.stopping and run.failure is None and run.done < 1.0
        if stopped:
            run.log.say(f"stopped at step {run.step}, which is saved: the same command goes on from there")
        elif run.failure is None:
            run.log.done(run.step)
    if run.failure is not None:
        raise run.failure
    if stopped:
        raise KeyboardInterrupt  # or what comes after this stage would begin with half of it
    return state
