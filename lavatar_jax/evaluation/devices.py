"""Accelerators that a plan can be made for, and how well programs use them.

Nominal numbers are the vendors' for dense arithmetic with 32-bit accumulation. `ceiling` is what a large
matrix product is assumed to reach of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.flops import StreamShape

USABLE_MEMORY = 0.92  # of a device's; `cli.configure_jax` asks for it. The rest: driver, context, fragments


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

    def rate(self, dtype: str) -> float:
        """TFLOP/s of a large matrix product; of float32 as TF32, which XLA takes for it on these devices."""
        return self.ceiling * {"fp8": self.fp8, "bf16": self.bf16, "fp32": self.bf16 / 2}[dtype]


# H100: others report about 790 TFLOP/s in bf16 (0.80 of nominal, at its power limit); H200, H800 and GH200
# have the same chip. The H20 is that chip cut to 15 % of the arithmetic, so power and memory never hold it
# back. The A100 has no 8-bit floats: they are computed in 16 bits.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="4090", bf16=165, fp8=330, memory=24, bandwidth=1008, link=25, power=450, ceiling=0.90),
        Gpu(name="5090", bf16=209, fp8=419, memory=32, bandwidth=1792, link=50, power=575, ceiling=0.90),
        Gpu(name="l40s", bf16=362, fp8=733, memory=48, bandwidth=864, link=32, power=350, ceiling=0.80),
        Gpu(name="a100", bf16=312, fp8=312, memory=80, bandwidth=2039, link=300, power=400, ceiling=0.80),
        Gpu(name="h20", bf16=148, fp8=296, memory=96, bandwidth=4000, link=450, power=400, ceiling=0.95),
        Gpu(name="h100", bf16=989, fp8=1979, memory=80, bandwidth=3350, link=450, power=700, ceiling=0.80),
        Gpu(name="h800", bf16=989, fp8=1979, memory=80, bandwidth=3350, link=200, power=700, ceiling=0.80),
        Gpu(name="gh200", bf16=989, fp8=1979, memory=96, bandwidth=4000, link=450, power=900, ceiling=0.80),
        Gpu(name="h200", bf16=989, fp8=1979, memory=141, bandwidth=4800, link=450, power=700, ceiling=0.80),
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
    rotation, softmax, slower kernels, launches. `decoder_passes` is the same for the VAE, in units of
    `decoder_bytes`. `ceilings` (TFLOP/s) replace those of the `measured` device, that of linear layers in the
    measured `dtype` only; `decoder_ceiling`, where it was measured, that of float32.
    """

    name: str
    passes: float
    decoder_passes: float
    text_cached: bool = True
    measured: str = ""  # full name of a device
    dtype: str = ""
    ceilings: tuple[float, float] = (0.0, 0.0)  # of linear layers, of attention
    decoder_ceiling: float = 0.0

    def rates(self, device: Gpu, dtype: str) -> tuple[float, float]:
        """TFLOP/s of linear layers and of attention, which stays in 16 bits."""
        linear, attention = self.ceilings
        if not self._is_of(device):
            return device.rate(dtype), device.rate("bf16")
        return linear if dtype == self.dtype else device.rate(dtype), attention

    def decoder_rate(self, device: Gpu, value_bytes: int) -> float:
        """TFLOP/s of the VAE, whose values have so many bytes."""
        if value_bytes == 2:
            return self.rates(device, "bf16")[1]
        return self.decoder_ceiling if self.decoder_ceiling and self._is_of(device) else device.rate("fp32")

    def _is_of(self, device: Gpu) -> bool:
        known = find_gpu(self.measured)
        return known is not None and known.name == device.name


# One number fitted to one row of the paper each: 36.0 FPS (5x H800, bf16), and the 0.15 s by which its times
# to the first frame exceed the denoising steps, taken for a decoder in 16 bits. The rows with fp8 and on H20
# are predictions.
PAPER = Calibration(name="paper", passes=399.0, decoder_passes=570.0, text_cached=False)


def from_measurement(report: Mapping[str, Any], shape: StreamShape) -> Calibration:
    """What `tools/bench_step.py --json` wrote, for a forward of this `shape` (the layers it measured).

    Raises UserError for anything else.
    """
    if report.get("kind") != "step":
        raise UserError("a calibration is the JSON that tools/bench_step.py writes")
    ceilings = report["ceiling_tflops"]["linear"], report["ceiling_tflops"]["attention"]
    of_decoder = report["ceiling_tflops"].get("decoder", 0.0)
    cached = report["text_cached"]
    arithmetic = arithmetic_s(shape, *ceilings, text_cached=cached)
    left = max(0.0, report["ms"] / 1e3 - arithmetic)
    passes = left * report["bandwidth_gbs"] * 1e9 / activation_bytes(shape)
    decoder = PAPER.decoder_passes
    if of_decoder:
        left = report["decoder"]["ms"] / 1e3 - report["decoder_flops"] / of_decoder / 1e12
        height, width = report["pixels"]
        decoder = max(0.0, left) * report["bandwidth_gbs"] * 1e9 / decoder_bytes(height, width, 4)
    return Calibration(
        name=f"{report['device']} {report['dtype']} {report['date']}",
        passes=passes,
        decoder_passes=decoder,
        text_cached=cached,
        measured=report["device"],
        dtype=report["dtype"],
        ceilings=ceilings,
        decoder_ceiling=of_decoder,
    )


def activation_bytes(shape: StreamShape) -> float:
    """The 16-bit activations of all layers, once."""
    return 2.0 * shape.queries * shape.config.width * shape.config.layers


def decoder_bytes(height: int, width: int, value_bytes: int) -> float:
    """A decoded block as 96 channels of values of so many bytes, once."""
    return 96.0 * 12 * height * width * value_bytes


def arithmetic_s(shape: StreamShape, linear: float, attention: float, *, text_cached: bool) -> float:
    """Seconds of matrix products of one forward at these rates, TFLOP/s."""
    copies = 5 if text_cached else 73
    parts = shape.flops(text_cached=text_cached, audio_copies=copies)
    attended = parts["self-attention"] + parts["cross-attention"]
    return ((sum(parts.values()) - attended) / linear + attended / attention) / 1e12
