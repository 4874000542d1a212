"""Checkpoints of a training run: the whole state and the place in the data, to go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lavatar_jax.errors import UserError

State = TypeVar("State")


def flatten_names(tree: Any) -> dict[str, Any]:
    """Leaves by their path, a form of any pytree that needs no class to be read back."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


class RunCheckpoints:
    """The two newest checkpoints in a folder, written by orbax to a temporary name first."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: Any, data: dict[str, Any]) -> None:
        """Write `state` (its `step` names the checkpoint) and the data iterator's state; no-op if present."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        arrays = {name: np.asarray(leaf) for name, leaf in flatten_names(state).items()}
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), data=ocp.args.JsonSave(data))
        )

    def restore(self, state: State) -> tuple[State, dict[str, Any] | None]:
        """The newest checkpoint in the form of `state`, or `state` itself and None when there is none.

        Raises UserError when names or shapes differ from those of `state`.
        """
        step = self.manager.latest_step()
        if step is None:
            return state, None
        expected = {name: np.asarray(leaf) for name, leaf in flatten_names(state).items()}
        found = self.read(step)
        wrong = [
            name
            for name in sorted(expected.keys() | found.keys())
            if name not in expected or name not in found or expected[name].shape != found[name].shape
        ]
        if wrong:
            raise UserError(
                f"the checkpoint in {self.folder} is of another model ({len(wrong)} differences, first: "
                f"{wrong[0]}); choose another --out or remove that folder"
            )
        data = self.manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
        structure = jax.tree.structure(state)
        return jax.tree.unflatten(structure, [jnp.asarray(found[name]) for name in expected]), data

    def read(self, step: int | None = None) -> dict[str, np.ndarray]:
        """All arrays of a checkpoint (default: the newest) by name. Raises UserError when there is none."""
        step = self.manager.latest_step() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.folder}: train first, or give the folder of a run")
        restored = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
        return {name: np.asarray(value) for name, value in restored["state"].items()}

    def close(self) -> None:
        self.manager.close()


def read_average(run: Path) -> dict[str, np.ndarray]:
    """The averaged parameters of a run's newest checkpoint, by dotted parameter name."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} is not a training run: it has no checkpoints folder")
    checkpoints = RunCheckpoints(folder)
    found = checkpoints.read()
    checkpoints.close()
    prefix = ".average['"
    return {name[len(prefix) : -2]: value for name, value in found.items() if name.startswith(prefix)}
