"""Checkpoints of a training run: the whole state and the place in the data, to go on exactly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from lavatar_jax.checkpoints.orbax_store import alone, reader
from lavatar_jax.checkpoints.sources import TensorInfo
from lavatar_jax.errors import UserError

State = TypeVar("State")

_AVERAGE = ".average['"  # begins the names of averaged parameters, which "']" ends
_TO_HOST = ocp.RestoreArgs(restore_type=np.ndarray)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints stay: the `keep` newest, those of every `every`-th step, and the best by a number of
    the evaluation.

    `every`: None, none stay for their step; else such steps are saved too, whatever the time. `best`: the
    number's name, as the log has it; None: no evaluation decides.
    """

    keep: int = 2
    every: int | None = None
    best: str | None = None
    best_mode: Literal["min", "max"] = "max"
    asynchronous: bool = True  # written while training goes on


def flatten_names(tree: Any) -> dict[str, Any]:
    """Leaves by their path, a form of any pytree that needs no class to be read back."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


class RunCheckpoints:
    """The newest checkpoints in a folder, and the best; orbax writes each to a temporary name first.

    `read_only`: each process reads by itself, whatever the others do.
    """

    def __init__(self, folder: Path, config: CheckpointConfig | None = None, *, read_only: bool = False):
        self.folder, self.config = folder.absolute(), config or CheckpointConfig()
        kept: list[Any] = [LatestN(self.config.keep)]
        if self.config.every is not None:
            kept.append(EveryNSteps(self.config.every))
        if self.config.best is not None:
            # BestN keeps the last of the sorted ones.
            better = self.config.best_mode == "max"
            kept.append(
                BestN(
                    get_metric_fn=self._metric,
                    reverse=not better,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            best_fn=self._metric if self.config.best is not None else None,
            best_mode=self.config.best_mode,
            enable_async_checkpointing=self.config.asynchronous and not read_only,
            create=not read_only,
            multiprocessing_options=alone() if read_only else ocp.options.MultiprocessingOptions(),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def _metric(self, metrics: Mapping[str, float]) -> float:
        worst = -np.inf if self.config.best_mode == "max" else np.inf
        value = metrics.get(self.config.best or "", worst)
        return value if np.isfinite(value) else worst

    def stays(self, step: int) -> bool:
        """Whether a checkpoint of this step is wanted for the step's sake."""
        return self.config.every is not None and step % self.config.every == 0

    def save(self, state: Any, data: dict[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Write `state` (its `step` names the checkpoint) and the data iterator's state; no-op if present.

        With several processes all must call it; each keeps its own iterator's state. Returns when the arrays
        are copied, so that they may be donated. A state whose `metrics` lack the number that decides on the
        best is not the best.
        """
        step = int(jax.device_get(state.step))
        if step in self.manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(flatten_names(state)), data=ocp.args.JsonSave(_of_all_processes(data))
        )
        if self.config.best is not None:  # orbax wants to hear of it always
            metrics = {self.config.best: np.nan, **(metrics or {})}
        self.manager.save(step, args=arguments, metrics=dict(metrics) if metrics else None)

    def newest(self) -> int | None:
        """The step of the newest checkpoint, as the first process sees it: others, on a file system that is
        shared, may still see an earlier one. All must call it."""
        found = self.manager.latest_step()
        if jax.process_count() == 1:
            return found
        told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found)))
        return None if told < 0 else told

    def restore(self, state: State) -> tuple[State, dict[str, Any] | None]:
        """The newest checkpoint in the form of `state`, or `state` itself and None when there is none.

        Arrays come back with the shardings of those in `state` (which may be abstract), whatever mesh they
        were saved from. Raises UserError when names or shapes differ.
        """
        step = self.newest()
        if step is None:
            return state, None
        expected = flatten_names(state)
        stored = self.stored(step)
        wrong = [
            name
            for name in sorted(expected.keys() | stored.keys())
            if name not in expected
            or name not in stored
            or tuple(expected[name].shape) != tuple(stored[name].shape)
        ]
        if wrong:
            raise UserError(
                f"the checkpoint in {self.folder} is of another model, or of options that give the state "
                f"other parts (docs/training.md; {len(wrong)} differences, first: {wrong[0]}); choose "
                "another --out or remove that folder"
            )
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
            for name, leaf in expected.items()
        }
        found = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted),
                data=ocp.args.JsonRestore(),
            ),
        )
        structure = jax.tree.structure(state)
        leaves = [found["state"][name] for name in expected]
        return jax.tree.unflatten(structure, leaves), _of_this_process(found["data"])

    def stored(self, step: int | None) -> dict[str, Any]:
        """Shapes and dtypes of a checkpoint's arrays by name. Raises UserError when there is none."""
        if step is None:
            raise UserError(f"no checkpoint in {self.folder}: train first, or give the folder of a run")
        return self.manager.item_metadata(step)["state"].tree

    def read(self, step: int | None = None, prefix: str = "", shardings: Any = None) -> dict[str, Any]:
        """Arrays of a checkpoint (default: the newest) by name, those whose name begins with `prefix`.

        `shardings(name, shape)` places them; None: numpy arrays, which pass through no device. Raises
        UserError when there is none.
        """
        step = self.manager.latest_step() if step is None else step
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=shardings(name, leaf.shape)) if shardings else _TO_HOST
            for name, leaf in self.stored(step).items()
            if name.startswith(prefix)
        }
        return self.load(step, arguments)

    def load(self, step: int | None, arguments: Mapping[str, ocp.RestoreArgs]) -> dict[str, Any]:
        """Some arrays of a checkpoint that is there, by name, as they are asked for."""
        folder = self.folder / str(step) / "state"
        request = ocp.args.PyTreeRestore(
            item=dict.fromkeys(arguments, 0), restore_args=dict(arguments), partial_restore=True
        )
        with reader() as checkpointer:
            return checkpointer.restore(folder, args=request)

    def best_step(self) -> int | None:
        """The step of the best checkpoint that is kept, or of one where none was measured; None where nothing
        chooses."""
        return self.manager.best_step() if self.config.best is not None else None

    def close(self) -> None:
        """Wait for what is being written."""
        self.manager.close()


def read_average(run: Path, shardings: Any = None) -> dict[str, Any]:
    """The averaged parameters of a run (at its `result_step`), by dotted parameter name.

    `shardings(name, shape)`: where they go; None: to the host, as numpy arrays. Raises UserError for a folder
    that is no run.
    """
    checkpoints, step = _open_result(run)

    def place(name: str, shape: tuple[int, ...]) -> Any:
        return shardings(_parameter(name), shape)

    found = checkpoints.read(step, _AVERAGE, place if shardings else None)
    checkpoints.close()
    return {_parameter(name): value for name, value in found.items()}


class RunAverage:
    """What `read_average` gives, one parameter after the other; a checkpoint like those of `sources`.

    `step`: of the run's result. Raises UserError for a folder that is no run, or has no checkpoint.
    """

    def __init__(self, run: Path) -> None:
        self._checkpoints, self.step = _open_result(run)
        stored = self._checkpoints.stored(self.step)
        folder = self._checkpoints.folder / str(self.step)
        self.files = (folder,)
        self.infos = {
            _parameter(name): TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype), folder)
            for name, leaf in stored.items()
            if name.startswith(_AVERAGE)
        }
        self._last: dict[str, np.ndarray] = {}

    def read(self, key: str) -> np.ndarray:
        """A parameter with all its layers, kept until another one is read: they are asked for one by one.

        Raises UserError if the checkpoint is no longer there.
        """
        if key not in self._last:
            self._last.clear()  # before the next one is read
            name = f"{_AVERAGE}{key}']"
            try:
                self._last[key] = self._checkpoints.load(self.step, {name: _TO_HOST})[name]
            except Exception:
                if self.files[0].is_dir():
                    raise
                raise UserError(
                    f"{self.files[0]} was removed while it was read, by a training that goes on: wait for "
                    "its end, or let it keep more checkpoints (--checkpoint.keep)"
                ) from None
        return self._last[key]

    def close(self) -> None:
        self._checkpoints.close()


def _open_result(run: Path) -> tuple[RunCheckpoints, int | None]:
    """The checkpoints of a run, and its `result_step`. Raises UserError for a folder that is no run."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} is not a training run: it has no checkpoints folder")
    return RunCheckpoints(folder, read_only=True), result_step(run)


def _parameter(name: str) -> str:
    return name.removeprefix(_AVERAGE).removesuffix("']")


def result_step(run: Path) -> int | None:
    """The step of the checkpoint that counts as what a run made: its best one, where `config.json` tells by
    which number that is (`--checkpoint.best`), else the newest. None where there is none, or no run."""
    folder, path = run / "checkpoints", run / "config.json"
    if not folder.is_dir():
        return None
    config = json.loads(path.read_text()).get("checkpoint", {}) if path.is_file() else {}
    if config.get("best") is not None:
        checkpoints = RunCheckpoints(folder, CheckpointConfig(**config), read_only=True)
        step = checkpoints.best_step()
        checkpoints.close()
        if step is not None:
            return step
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)


def result_time(run: Path) -> int | None:
    """When the checkpoint that counts as what a run made was written, in ns: no two trainings agree in it, a
    copy of the folder does. None where there is none, or no run."""
    if (step := result_step(run)) is None:
        return None
    metadata = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return json.loads(metadata.read_text()).get("init_timestamp_nsecs") if metadata.is_file() else None


def _of_all_processes(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The data iterator's state of every process, in their order."""
    if jax.process_count() == 1:
        return [data]
    with jax.transfer_guard("allow"):
        text = np.frombuffer(json.dumps(data).encode(), np.uint8)
        sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).reshape(-1)
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: len(text)] = text
        rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _of_this_process(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Its own state; with another number of processes than then, the first one's: all are at one place."""
    same = len(states) == jax.process_count()
    return states[jax.process_index() if same else 0]
