"""Accelerators that a plan can be made for, and how well programs use them.

Nominal numbers are the vendors' for dense arithmetic with 32-bit accumulation. `ceiling` is what a large
matrix product reaches of them: measured where `measured`, else assumed from the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.flops import StreamShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device. TFLOP/s, GB, GB/s (`link`: to its neighbour, one direction), watts under load."""

    name: str
    bf16: float
    fp8: float
    memory: float
    bandwidth: float
    link: float
    power: float
    ceiling: float
    measured: bool = False

    def rate(self, dtype: str) -> float:
        """TFLOP/s of a large matrix product."""
        return self.ceiling * (self.fp8 if dtype == "fp8" else self.bf16)


# H100: 790 TFLOP/s in bf16 were measured (0.80 of nominal, at its power limit); H200 and H800 have the same
# chip. The H20 is that chip cut to 15 % of the arithmetic, so power and memory never hold it back.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="4090", bf16=165, fp8=330, memory=24, bandwidth=1008, link=25, power=450, ceiling=0.90),
        Gpu(name="5090", bf16=209, fp8=419, memory=32, bandwidth=1792, link=50, power=575, ceiling=0.90),
        Gpu(name="h20", bf16=148, fp8=296, memory=96, bandwidth=4000, link=450, power=400, ceiling=0.95),
        Gpu(
            name="h100", bf16=989, fp8=1979, memory=80, bandwidth=3350, link=450, power=700, ceiling=0.80,
            measured=True,
        ),
        Gpu(name="h800", bf16=989, fp8=1979, memory=80, bandwidth=3350, link=200, power=700, ceiling=0.80),
        Gpu(
            name="h200", bf16=989, fp8=1979, memory=141, bandwidth=4800, link=450, power=700, ceiling=0.80,
            measured=True,
        ),
        Gpu(name="b200", bf16=2250, fp8=4500, memory=180, bandwidth=8000, link=900, power=1000, ceiling=0.75),
    )
}  # fmt: skip


def gpu(name: str) -> Gpu:
    """By name. Raises UserError with the known ones."""
    if name.lower() not in GPUS:
        raise UserError(f"{name}: unknown device; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]


def find_gpu(kind: str) -> Gpu | None:
    """The device of a full name, such as "NVIDIA H100 80GB HBM3"; None if it is not known."""
    words = kind.lower().replace("-", " ").split()
    return next((device for name, device in GPUS.items() if name in words), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a program costs beyond its arithmetic at the ceiling.

    A forward takes `arithmetic / ceiling + passes * activations / bandwidth`: `passes` is how often, in each
    layer, as many bytes as the 16-bit activations [T, D] would have to go through memory to explain the time
    that is left. It stands for everything that is not a matrix product at full speed: norms, modulation,
    rotation, softmax, slower kernels, launches. `decoder_passes` is the same for the VAE, in units of the
    decoded block's pixels x 96 channels in 16 bits. `ceilings` (TFLOP/s) replace those of the
    `measured` device, that of linear layers in the measured `dtype` only.
    """

    name: str
    passes: float
    decoder_passes: float
    text_cached: bool = True
    measured: str = ""  # full name of a device
    dtype: str = ""
    ceilings: tuple[float, float] = (0.0, 0.0)  # of linear layers, of attention

    def rates(self, device: Gpu, dtype: str) -> tuple[float, float]:
        """TFLOP/s of linear layers and of attention, which stays in 16 bits."""
        known, (linear, attention) = find_gpu(self.measured), self.ceilings
        if known is None or known.name != device.name:
            return device.rate(dtype), device.rate("bf16")
        return linear if dtype == self.dtype else device.rate(dtype), attention


# One number fitted to one row of the paper each: 36.0 FPS (5x H800, bf16), and the 0.15 s by which its times
# to the first frame exceed the denoising steps. The rows with fp8 and on H20 are predictions.
PAPER = Calibration(name="paper", passes=399.0, decoder_passes=570.0, text_cached=False)


def from_measurement(report: Mapping[str, Any], shape: StreamShape) -> Calibration:
    """What `tools/bench_step.py --json` wrote, for a forward of this `shape` (the layers it measured).

    Raises UserError for anything else.
    """
    if report.get("kind") != "step":
        raise UserError("a calibration is the JSON that tools/bench_step.py writes")
    ceilings = report["ceiling_tflops"]["linear"], report["ceiling_tflops"]["attention"]
    cached = report["text_cached"]
    arithmetic = arithmetic_s(shape, *ceilings, text_cached=cached)
    left = max(0.0, report["ms"] / 1e3 - arithmetic)
    passes = left * report["bandwidth_gbs"] * 1e9 / activation_bytes(shape)
    decoder = PAPER.decoder_passes
    if measured := report.get("decoder"):
        left = measured["ms"] / 1e3 - report["decoder_flops"] / ceilings[1] / 1e12
        height, width = report["pixels"]
        decoder = max(0.0, left) * report["bandwidth_gbs"] * 1e9 / decoder_bytes(height, width)
    return Calibration(
        name=f"{report['device']} {report['dtype']} {report['date']}",
        passes=passes,
        decoder_passes=decoder,
        text_cached=cached,
        measured=report["device"],
        dtype=report["dtype"],
        ceilings=ceilings,
    )


def activation_bytes(shape: StreamShape) -> float:
    """The 16-bit activations of all layers, once."""
    return 2.0 * shape.queries * shape.config.width * shape.config.layers


def decoder_bytes(height: int, width: int, frames: int = 12, channels: int = 96) -> float:
    """A block at full resolution, 16 bits, once."""
    return 2.0 * height * width * frames * channels


def arithmetic_s(shape: StreamShape, linear: float, attention: float, *, text_cached: bool) -> float:
    """Seconds of matrix products of one forward at these rates, TFLOP/s."""
    copies = 5 if text_cached else 73
    parts = shape.flops(text_cached=text_cached, audio_copies=copies)
    attended = parts["self-attention"] + parts["cross-attention"]
    return ((sum(parts.values()) - attended) / linear + attended / attention) / 1e12
