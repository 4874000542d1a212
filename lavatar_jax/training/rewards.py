"""Rewards for DynaForcing on rendered faces, whose true mouth opening is known (`dynaforcing.DynaConfig`).

A linear probe reads the opening of each video frame from the latents around the mouth. It is fitted once, to
the latents of real clips, and never trained; rewards weight gradients, so it need not be differentiated.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lavatar_jax.errors import UserError
from lavatar_jax.training.dynaforcing import Reward
from lavatar_jax.training.latents import open_latents

log = logging.getLogger(__name__)
CLIPS = 1000  # to fit the probe, and a quarter of them to test it
RIDGE = 3e-2  # as a share of the features' mean variance
AT_MOUTH = 0.25  # cells whose mean weight is that part of the largest are looked at
LEAST = 0.5  # correlation with the truth on clips that the probe has not seen


class Probe(NamedTuple):
    """Which cells are looked at, and what they say of the four video frames of a latent frame."""

    row: Int[Array | np.ndarray, " N"]
    column: Int[Array | np.ndarray, " N"]
    weight: Float[Array | np.ndarray, "D 4"]


def look_at(probe: Probe, clip: Float[Array | np.ndarray, "B F H W C"]) -> Float[Array, "B F D"]:
    """The probe's cells, less the clip's mean: faces differ in colour, mouths move."""
    cells = clip[:, :, probe.row, probe.column]
    cells = cells.reshape(*clip.shape[:2], -1)
    return jnp.asarray(cells - cells.mean(axis=1, keepdims=True))


def fit_probe(
    clip: Float[np.ndarray, "N F H W C"],
    mouth: Float[np.ndarray, "N H W"],
    openness: Float[np.ndarray, "N T"],
) -> Probe:
    """Ridge regression of the opening of every video frame, less the clip's mean."""
    average = mouth.mean(axis=0)
    row, column = np.nonzero(average >= AT_MOUTH * average.max())
    probe = Probe(row, column, np.zeros((0, 4)))
    x = np.asarray(look_at(probe, clip), np.float64)
    y = np.asarray(openness - openness.mean(axis=1, keepdims=True), np.float64).reshape(-1, 4)
    x = x.reshape(len(y), -1)
    gram = x.T @ x
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    return probe._replace(weight=np.linalg.solve(gram + ridge, x.T @ y).astype(np.float32))


def opening(probe: Probe, clip: Float[Array | np.ndarray, "B F H W C"]) -> Float[Array, "B T"]:
    """The mouth's opening in every video frame, less the clip's mean, as the probe reads it."""
    read = look_at(probe, clip) @ probe.weight
    return read.reshape(read.shape[0], -1)


def correlation(
    a: Float[Array | np.ndarray, "B T"], b: Float[Array | np.ndarray, "B T"]
) -> Float[Array, " B"]:
    """Of each row; 0 where one does not move."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = jnp.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return (a * b).sum(axis=1) / jnp.maximum(scale, 1e-6)


def mouth_sync(run: Any) -> Reward:
    """How well the mouth follows the speech: its opening's correlation with the truth. Raises UserError."""

    def measure(probe: Probe, clip: Array, batch: dict[str, Array]) -> Array:
        return correlation(opening(probe, clip), batch["openness"])

    return Reward(measure, _probe(run))


def mouth_motion(run: Any) -> Reward:
    """How much the mouth moves: its opening's deviation, as a share of the truth's. Raises UserError."""

    def measure(probe: Probe, clip: Array, batch: dict[str, Array]) -> Array:
        moved = jnp.std(opening(probe, clip), axis=1)
        return moved / jnp.maximum(jnp.std(batch["openness"], axis=1), 0.05)

    return Reward(measure, _probe(run))


def _probe(run: Any) -> Probe:
    """A probe that is fitted to the run's data and tested on clips that it has not seen."""
    source = open_latents(run.data)
    if len(source.buckets) > 1:
        raise UserError(f"{run.data.folder} has clips of several kinds or sizes; mouth rewards need one")
    count = min(CLIPS, len(source))
    clips = source.read_batch(np.linspace(0, len(source) - 1, count).astype(int))
    if "openness" not in clips:
        raise UserError(f"{run.data.folder} does not know how far mouths are open: rewards need `openness`")
    latent, mouth, truth = (clips[name] for name in ("latent", "mouth", "openness"))
    held_out = np.arange(count) % 4 == 0
    probe = fit_probe(latent[~held_out], mouth[~held_out], truth[~held_out])
    quality = float(correlation(opening(probe, latent[held_out]), truth[held_out]).mean())
    log.info("the mouth probe's correlation with the truth on held-out clips is %.3f", quality)
    if not quality >= LEAST:
        raise UserError(
            f"mouths cannot be read from the latents of {run.data.folder}: the probe's correlation with the "
            f"truth is {quality:.2f} on {int(held_out.sum())} held-out clips; encode more, or leave the "
            "rewards out"
        )
    return jax.tree.map(jnp.asarray, probe)
