"""The optimizer (Muon on matrices and Adam on the rest, or AdamW), and the schedule of its learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

# Every Muon update gets the root mean square that Adam's updates have in practice, so that one learning
# rate serves both (arXiv 2502.16982).
UPDATE_RMS = 0.2

Schedule = Literal["linear", "cosine", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """`momentum` is Muon's; `betas` are Adam's."""

    kind: Literal["muon", "adamw"] = "muon"
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0  # largest norm of the gradient; 0: any
    schedule: Schedule = "linear"  # after the warm-up: flat, then down from the middle on; cosine; flat


def matrix_axes(name: str, value: Any, stacked: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """How a parameter is seen as a matrix by Muon; None leaves it to Adam.

    Only names that end in `weight` with at least two axes (besides the layer axis of modules named in
    `stacked`) are matrices, and the factors of adapters: the last axis is the output, all others of the
    kernel are the input.
    """
    first = 1 if name.split(".")[0] in stacked else 0
    if not name.endswith(("weight", "weight.a", "weight.b")) or value.ndim - first < 2:
        return None
    last = value.ndim - 1
    return MuonDimensionNumbers(reduction_axis=tuple(range(first, last)), output_axis=last)


def make_optimizer(
    params: Mapping[str, Any],
    *,
    stacked: tuple[str, ...] = (),
    momentum: float | None = None,
    weight_decay: float = 0.0,
    config: OptimConfig | None = None,
    still: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """The optimizer of `config` for these parameters (abstract ones will do); learning rate 1.

    Muon takes matrices and convolution kernels, Adam gains, biases and tables. Only matrices decay, and
    of them none whose name begins as one of `still`: what has no gradient stays as it is.
    """
    config = config or OptimConfig()
    axes = {name: matrix_axes(name, value, stacked) for name, value in params.items()}
    b1, b2 = config.betas
    decays = {name: where is not None and not name.startswith(still) for name, where in axes.items()}
    if config.kind == "adamw":
        return optax.adamw(1.0, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
    return muon(
        learning_rate=1.0,
        beta=config.momentum if momentum is None else momentum,
        weight_decay=weight_decay,
        weight_decay_mask=decays,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=0.0,
        consistent_rms=UPDATE_RMS,
        muon_weight_dimension_numbers=axes,
    )


def schedule(progress: float, *, warmup: float, kind: Schedule = "linear") -> float:
    """Factor on the learning rate at `progress` in [0, 1] of the run, with linear warm-up over its part
    `warmup`. On the host, because progress may be in seconds."""
    rise = min(1.0, progress / warmup) if warmup > 0 else 1.0
    if kind == "constant":
        return rise
    if kind == "cosine":
        rest = min(1.0, max(0.0, (progress - warmup) / max(1e-9, 1.0 - warmup)))
        return min(rise, 0.5 + 0.5 * math.cos(math.pi * rest))
    return min(rise, max(0.0, 2.0 * (1.0 - progress)))


def clip_by_norm(gradient: Any, norm: jax.Array, largest: float) -> Any:
    """Gradients scaled down to the norm `largest` (0: as they are); `norm` is theirs."""
    if not largest:
        return gradient
    scale = jax.numpy.minimum(1.0, largest / (norm + 1e-9))
    return jax.tree.map(lambda g: g * scale, gradient)
