"""Make blocks on their way hear silence: their remaining steps close the mouth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lavatar_jax.inference.pipeline import Pipeline
from lavatar_jax.parallel import STAGE


class Hush:
    """Replaces the speech features that a slot's blocks carry from stage to stage by those of silence.

    Without it, an interrupted avatar would go on talking, mute, for as many blocks as the pipeline holds.
    """

    def __init__(self, pipeline: Pipeline, silence_LAT: Float[np.ndarray, "L A T"]) -> None:
        self._pipeline = pipeline
        mesh = pipeline.mesh
        self._silence = jax.device_put(silence_LAT, NamedSharding(mesh, P()))

        def write(audio: Array, silence: Array, slot: Array) -> Array:
            ours = jnp.arange(audio.shape[0]) % pipeline.slots == slot
            return jnp.where(ours.reshape(-1, 1, 1, 1, 1), silence, audio)

        self._write: Any = jax.jit(write, donate_argnums=0, out_shardings=NamedSharding(mesh, P(STAGE)))

    def __call__(self, slot: int) -> None:
        """Call it between ticks."""
        packet = self._pipeline._packet
        audio = self._write(packet.inputs.audio, self._silence, jnp.int32(slot))
        self._pipeline._packet = packet._replace(inputs=packet.inputs._replace(audio=audio))
