"""Muon on matrices, Adam on the rest, and a schedule of the progress of a run."""

from __future__ import annotations

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lavatar_jax.training.state import Params

# Every Muon update gets the root mean square that Adam's updates have in practice, so that one learning
# rate serves both (arXiv 2502.16982).
UPDATE_RMS = 0.2


def matrix_axes(name: str, value: jax.Array, stacked: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """How a parameter is seen as a matrix by Muon; None leaves it to Adam.

    Only names that end in `weight` with at least two axes (besides the layer axis of modules named in
    `stacked`) are matrices: the last axis is the output, all others of the kernel are the input.
    """
    first = 1 if name.split(".")[0] in stacked else 0
    if name.split(".")[-1] != "weight" or value.ndim - first < 2:
        return None
    last = value.ndim - 1
    return MuonDimensionNumbers(reduction_axis=tuple(range(first, last)), output_axis=last)


def make_optimizer(
    params: Params, *, stacked: tuple[str, ...] = (), momentum: float = 0.95, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Muon for matrices and convolution kernels, Adam for gains, biases, tables; learning rate 1."""
    axes = {name: matrix_axes(name, value, stacked) for name, value in params.items()}
    return muon(
        learning_rate=1.0,
        beta=momentum,
        weight_decay=weight_decay,
        adam_b1=0.9,
        adam_b2=0.98,
        adam_weight_decay=0.0,
        consistent_rms=UPDATE_RMS,
        muon_weight_dimension_numbers=axes,
    )


def schedule(progress: float, *, warmup: float) -> float:
    """Factor on the learning rate at `progress` in [0, 1]: linear warm-up, flat, linear decay from 1/2 on."""
    rise = min(1.0, progress / warmup) if warmup > 0 else 1.0
    return min(rise, max(0.0, 2.0 * (1.0 - progress)))
