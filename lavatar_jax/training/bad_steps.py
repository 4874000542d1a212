"""Steps that must not change the model: a gradient that is not finite, a loss that jumps.

The step itself leaves the state alone (`judge`, compiled into it), so nothing is lost by looking at it on the
host one step later (`BadSteps`): there the records of the batch are named, and the policy skips or stops.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lavatar_jax.errors import UserError

log = logging.getLogger(__name__)
Policy = Literal["skip", "stop"]
SPIKES_FROM = 50  # good steps before a loss can be called a spike
MOST_IN_A_ROW = 20  # bad steps, until "skip" stops too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Usual:
    """What the loss has been: a running mean over good steps, and how many there were."""

    loss: jax.Array  # float32 []
    steps: jax.Array  # int32 []

    @classmethod
    def unknown(cls) -> Usual:
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def judge(usual: Usual, loss: jax.Array, gradient_norm: jax.Array, spike: float) -> tuple[jax.Array, Usual]:
    """-> (whether this step may change the model, what is usual after it).

    Bad: loss or gradient are not finite, or the loss is more than `spike` times the usual one (0: never).
    """
    good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if spike:
        good &= (usual.steps < SPIKES_FROM) | (loss <= spike * jnp.abs(usual.loss))
    weight = jnp.maximum(0.01, 1.0 / (1.0 + usual.steps))
    mean = usual.loss + weight * (loss - usual.loss)
    return good, Usual(jnp.where(good, mean, usual.loss), usual.steps + good)


class BadSteps:
    """The host's side: names the records, counts, and stops by policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.total = policy, 0
        # Of stage 2's critic, and of the model that is trained, which learns there only now and then.
        self._critic_in_a_row, self._model_in_a_row = 0, 0

    @property
    def in_a_row(self) -> int:
        return max(self._critic_in_a_row, self._model_in_a_row)

    def check(self, step: int, metrics: dict[str, Any], records: Sequence[int] | None) -> str | None:
        """What was wrong with a step, or None.

        Metrics: `loss`; `bad` where the step judges itself; `student_turn` where a student learns only now
        and then, after a critic that was well: the other steps tell about the critic alone.
        """
        loss, turn = float(metrics["loss"]), bool(metrics.get("student_turn", 1))
        good = not metrics.get("bad", 0) and np.isfinite(loss)
        if turn:
            self._critic_in_a_row = 0
            self._model_in_a_row = 0 if good else self._model_in_a_row + 1
        else:
            self._critic_in_a_row = 0 if good else self._critic_in_a_row + 1
        if good:
            return None
        self.total += 1
        batch = "unknown records" if records is None else f"records {', '.join(map(str, records))}"
        norms = {"gradient norm": "grad_norm", "student's gradient norm": "student_grad_norm"}
        seen = [f", {label} {float(metrics[name]):.4g}" for label, name in norms.items() if name in metrics]
        complaint = f"step {step} was skipped: loss {loss:.4g}{''.join(seen)}, batch of {batch}"
        log.warning(complaint)
        return complaint

    def should_stop(self) -> bool:
        return bool(self.in_a_row) and (self.policy == "stop" or self.in_a_row >= MOST_IN_A_ROW)

    def error(self, complaint: str) -> UserError:
        """What to raise when training stops for it, after the checkpoint."""
        more = f" ({self.in_a_row} bad steps in a row)" if self.in_a_row > 1 else ""
        return UserError(
            f"{complaint}{more}. It changed no parameter; start again to go on behind this batch, if need be "
            "with a lower --train.learning-rate or with --train.on-bad-step skip"
        )
