"""The paper's table of speeds, and what the model of capacity says in its place."""

from __future__ import annotations

import dataclasses

from lavatar_jax.config import DiTConfig
from lavatar_jax.evaluation.capacity import Setup, make_plan
from lavatar_jax.evaluation.devices import GPUS


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A published number, and how it came into the model."""

    name: str
    gpu: str
    dtype: str
    steps: int
    quantity: str  # fps or ttff_s
    value: float
    role: str  # whether anything of it was fitted


PAPER_ROWS = (
    PaperRow("5x H800 bf16", "h800", "bf16", 4, "fps", 36.0, "fitted"),
    PaperRow("5x H800 fp8", "h800", "fp8", 4, "fps", 45.2, "predicted"),
    PaperRow("5x H20 fp8", "h20", "fp8", 4, "fps", 18.0, "predicted"),
    PaperRow("5x H800 fp8, first frame", "h800", "fp8", 4, "ttff_s", 1.21, "decoder fitted"),
    PaperRow("4x H800 fp8, first frame", "h800", "fp8", 3, "ttff_s", 0.95, "decoder fitted"),
    PaperRow("3x H800 fp8, first frame", "h800", "fp8", 2, "ttff_s", 0.68, "decoder fitted"),
)


def against_paper(height: int = 720, width: int = 400) -> list[tuple[PaperRow, float]]:
    """(row, what the model says) for the published numbers; 14B, one decoder of its own, in 16 bits."""
    result = []
    for row in PAPER_ROWS:
        device = GPUS[row.gpu]
        setup = Setup(
            config=DiTConfig(),
            height=height,
            width=width,
            ring=(device,) * row.steps,
            decoder=device,
            dtype=row.dtype,
            steps=row.steps,
            vae_bytes=2,
        )
        result.append((row, getattr(make_plan(setup), row.quantity)))
    return result
