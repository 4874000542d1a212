"""Whether a run fits its devices, worked out from shapes alone: `train.py CONFIG --plan` (`--plan-devices
1,8`, `--plan-gpu a100`).

Parameters and all that has their shapes are counted exactly. Activations are what the backward pass keeps, by
the traced program; the compiler may need less, and the communication's buffers are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lavatar_jax.evaluation.devices import GPUS, USABLE_MEMORY
from lavatar_jax.parallel import STACKED, param_spec
from lavatar_jax.training.precision import dtype_of
from lavatar_jax.training.run import Run
from lavatar_jax.training.state import LossFn, Params
from lavatar_jax.training.weights import Weights

COUNTS = (128, 64, 8)  # devices that a plan is made for
ROOMY = 0.95  # of the memory: communication is not counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a stage says about itself, all abstract.

    `state`: what training changes: `params`, `average`, `optimizer`, and `critic`, `critic_optimizer` where
    there is one. `loss`: the one whose backward pass keeps most. `layer`: weights and loss of the same model
    with one layer and nothing recomputed; None where there are no layers. `drawn`: what a sample has besides,
    from the step's beginning to its end. `cache`: keys and values that a sample streams with; tensor
    parallelism splits their heads.
    """

    weights: Weights[Any]
    state: Any
    loss: LossFn
    batch: dict[str, jax.ShapeDtypeStruct]  # one sample
    layer: tuple[Weights[Any], LossFn] | None = None
    drawn: Any = None
    cache: Any = None
    heads: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Devices, how they share a step, and the bytes on each by purpose."""

    data: int
    fsdp: int
    tensor: int
    batch: int
    accumulate: int
    memory: dict[str, float]

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def total_gb(self) -> float:
        return sum(self.memory.values()) / 1e9

    def fits(self, memory_gb: float) -> bool:
        return self.total_gb <= USABLE_MEMORY * memory_gb

    @property
    def options(self) -> str:
        """For `train.py`."""
        return (
            f"--mesh.data {self.data} --mesh.fsdp {self.fsdp} --mesh.tensor {self.tensor} "
            f"--train.batch {self.batch} --train.accumulate {self.accumulate}"
        )


def saved_bytes(loss: LossFn, weights: Weights[Any], batch: Any) -> tuple[float, float]:
    """-> (activations kept for the backward pass, copies of weights in the dtype of the computation)."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def residuals(params: Params, frozen: Params, batch: Any, key: jax.Array) -> list[jax.Array]:
        _, backward = jax.vjp(lambda params: loss(params, frozen, batch, key)[0], params)
        return jax.tree.leaves(backward)

    program = jax.make_jaxpr(residuals)(weights.params, weights.frozen, batch, key).jaxpr
    given = {*program.invars, *program.constvars}
    kept = {
        var for var in program.outvars if not isinstance(var, jax.extend.core.Literal) and var not in given
    }
    everything = {**weights.frozen, **weights.params}
    shapes = {leaf.shape for leaf in everything.values() if leaf.ndim > 2}
    activations = copies = 0.0
    for var in kept:
        if jax.dtypes.issubdtype(var.aval.dtype, jax.dtypes.prng_key):
            continue
        size = float(var.aval.size * var.aval.dtype.itemsize)
        if var.aval.shape in shapes:
            copies += size
        else:
            activations += size
    return activations, copies


def _bytes(tree: Any, fsdp: int, tensor: int, dtype: Callable[[str], np.dtype] | None = None) -> float:
    """Bytes a device of parameters by name, or of an optimizer's state that has the same names."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        spec = param_spec(names[-1] if names else "", leaf.shape, fsdp=fsdp, tensor=tensor)
        parts = math.prod({"fsdp": fsdp, "tensor": tensor}[axis] for axis in spec if axis is not None)
        item = (dtype(names[-1]) if dtype else leaf.dtype).itemsize
        total += math.prod(leaf.shape) * item / parts
    return total


def _size(tree: Any) -> float:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Planner:
    """Traces a run once, then gives the memory of any layout."""

    def __init__(self, run: Run, subject: Subject) -> None:
        self.run, self.subject = run, subject
        self.activations, self.copies = saved_bytes(subject.loss, subject.weights, subject.batch)
        self.working = 0.0
        if subject.layer is not None:
            weights, loss = subject.layer
            self.working = saved_bytes(loss, weights, subject.batch)[0]

    def memory(self, samples: int, fsdp: int, tensor: int, accumulate: int) -> dict[str, float]:
        """Bytes on each device while it computes `samples` at once."""
        weights, state, precision = self.subject.weights, self.subject.state, self.run.train.precision
        trained = [state.params, getattr(state, "critic", {})]
        optimizers = [state.optimizer, getattr(state, "critic_optimizer", {})]
        gradient = _bytes(state.params, fsdp, tensor)
        given = _size(self.subject.batch) + _size(self.subject.drawn)
        gathered = 0.0
        if fsdp > 1:  # the layer that is computed, the next one on its way, and all that is no layer
            for name, leaf in {**weights.frozen, **weights.params}.items():
                whole = _bytes({name: leaf}, 1, tensor, lambda name: dtype_of(name, precision))
                gathered += 2 * whole / leaf.shape[0] if name.split(".")[0] in STACKED else whole
        return {
            "frozen": _bytes(weights.frozen, fsdp, tensor),
            "trained": _bytes(trained, fsdp, tensor),
            "optimizer": _bytes(optimizers, fsdp, tensor),
            "average": _bytes(state.average, fsdp, tensor),
            "gradient": gradient * (1 + (accumulate > 1)),
            # All parts of the batch, and their copies in the order in which they are computed.
            "batch": samples * accumulate * (1 + (accumulate > 1)) * given,
            "weight copies": self.copies / (fsdp * tensor) + gathered,
            "activations": samples * self.activations,
            "working": samples * self.working,
            "cache": samples * _size(self.subject.cache) / tensor,
        }

    def layouts(self, devices: int) -> Iterator[Layout]:
        """Ways to share a step, those with the least communication first."""
        for tensor in (n for n in (1, 2, 4, 8) if devices % n == 0 and self.subject.heads % n == 0):
            shards = devices // tensor
            batch = -(-self.run.train.batch // shards) * shards
            for fsdp in (2**n for n in range(shards.bit_length()) if shards % 2**n == 0):
                parts = batch // shards
                # At least as many as were asked for, where there are so many samples on a device.
                least = min(self.run.train.accumulate, parts)
                for accumulate in (n for n in range(least, parts + 1) if parts % n == 0):
                    yield Layout(
                        data=shards // fsdp,
                        fsdp=fsdp,
                        tensor=tensor,
                        batch=batch,
                        accumulate=accumulate,
                        memory=self.memory(parts // accumulate, fsdp, tensor, accumulate),
                    )

    def configured(self, devices: int) -> Layout | None:
        """As `--mesh` and `--train` say; None where so many devices cannot be shared so."""
        train, mesh = self.run.train, self.run.mesh
        data = mesh.data or devices // (mesh.fsdp * mesh.tensor)
        if data * mesh.fsdp * mesh.tensor != devices or train.batch % (data * mesh.fsdp * train.accumulate):
            return None
        samples = train.batch // (data * mesh.fsdp * train.accumulate)
        memory = self.memory(samples, mesh.fsdp, mesh.tensor, train.accumulate)
        return Layout(
            data=data,
            fsdp=mesh.fsdp,
            tensor=mesh.tensor,
            batch=train.batch,
            accumulate=train.accumulate,
            memory=memory,
        )

    def suggest(self, devices: int, memory_gb: float) -> Layout:
        """The first that fits and leaves some memory, else the first that fits, or the one that needs the
        least."""
        layouts = list(self.layouts(devices))
        roomy = (layout for layout in layouts if layout.fits(ROOMY * memory_gb))
        fitting = (layout for layout in layouts if layout.fits(memory_gb))
        return next(roomy, next(fitting, min(layouts, key=lambda layout: layout.total_gb)))


def plan_text(run: Run, subject: Subject, counts: Sequence[int] = COUNTS, gpu: str = "h100") -> str:
    """A table of the suggested layouts, and those of the run itself, for devices with the memory of `gpu`."""
    planner, memory_gb = Planner(run, subject), GPUS[gpu].memory
    trained, frozen = (
        sum(math.prod(leaf.shape) for leaf in part.values())
        for part in (subject.weights.params, subject.weights.frozen)
    )
    lines = [
        f"{(trained + frozen) / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained; "
        f"computed in {run.train.precision}, remat {run.train.remat}, {run.optim.kind}",
        f"GB on each device ({gpu.upper()}, {memory_gb:.0f} GB; {USABLE_MEMORY:.0%} usable)",
    ]
    layouts = [planner.suggest(count, memory_gb) for count in counts]
    purposes = list(layouts[0].memory)
    lines.append("  ".join(["devices", "data x fsdp x tensor", "batch", "accumulate", *purposes, "total"]))
    own = [layout for layout in map(planner.configured, counts) if layout is not None]
    own = [layout for layout in own if layout not in layouts]
    for layout in (*layouts, *own):
        mesh = f"{layout.data} x {layout.fsdp} x {layout.tensor}"
        room = USABLE_MEMORY * memory_gb - layout.total_gb
        cells = [
            f"{layout.devices:7d}",
            f"{mesh:>20}",
            f"{layout.batch:5d}",
            f"{layout.accumulate:10d}",
            *(f"{layout.memory[name] / 1e9:{len(name)}.2f}" for name in purposes),
            f"{layout.total_gb:5.1f}",
            (f"fits, {room:.1f} left" if layout.fits(memory_gb) else "DOES NOT FIT")
            + ", as configured" * (layout in own),
        ]
        lines.append("  ".join(cells))
    if fitting := [layout for layout in layouts if layout.fits(memory_gb)]:
        lines.append("so, for train.py:")
        lines += [f"{layout.devices:7d}  {layout.options}" for layout in fitting]
    return "\n".join(lines)
