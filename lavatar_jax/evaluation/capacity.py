"""What a pipeline of given devices can do with a model of a given size: speed, memory, links, energy.

A stage's time is `arithmetic / ceiling + passes * activations / bandwidth` per denoising step (see
`devices.Calibration`); a tick is the slowest stage's, plus the hop; a tick makes one block of 12 frames.
Method: the paper's section 3.2 for the pipeline; `paper.py` holds it against the paper's table of speeds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from lavatar_jax.config import DiTConfig
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.devices import (
    GPUS,
    PAPER,
    USABLE_MEMORY,
    Calibration,
    Gpu,
    activation_bytes,
    arithmetic_s,
    decoder_bytes,
)
from lavatar_jax.evaluation.flops import StreamShape, layer_parameters, other_parameters

BLOCK_FRAMES = 12
VIDEO_FPS = 25
# Wan 2.1 VAE: FLOP a decoded pixel, of its one attention a latent frame; values of its streaming caches a
# latent pixel; arrays of a block at full resolution that are alive at once (as XLA compiles 12 frames for a
# CPU, encoder and decoder alike); parameters.
DECODER_FLOP, DECODER_ATTENTION = 8.445e6, 4 * 384
DECODER_CACHE, ENCODER_CACHE, VAE_ARRAYS, VAE_PARAMETERS = 151_328, 89_856, 8.2, 126.9e6
SPEECH_WEIGHTS, TEXT_WEIGHTS = 4 * 315.5e6, 2 * 5.681e9  # bytes; wav2vec2 in float32, umT5 in 16 bits
IDLE_POWER = 0.2  # share of a device's power that it draws while it waits


def dit_for(params: float) -> DiTConfig:
    """The transformer whose large matrices (without injectors) have about `params` weights.

    1.3e9 and 14e9 are the published shapes. Others get heads of 128 channels, a feed-forward 2.7 times as
    wide, and a depth that grows with the fourth root of the size: 48 layers of 6784 at 30e9, 65 of 10752 at
    100e9.
    """
    if not 1e8 <= params <= 1e12:
        raise UserError(f"--params {params:g}: expected between 1e8 and 1e12")
    if abs(params / 1.3e9 - 1) < 0.1:
        return DiTConfig(layers=30, width=1536, heads=12, ffn_width=8960, inject_layers=spread(30))
    if abs(params / 14e9 - 1) < 0.05:
        return DiTConfig()
    layers = round(40 * (params / 14e9) ** 0.25)
    heads = max(1, round(math.sqrt(params / (13.4 * layers)) / 128))
    ffn = round(2.7 * heads) * 128
    return DiTConfig(
        layers=layers, width=128 * heads, heads=heads, ffn_width=ffn, inject_layers=spread(layers)
    )


def spread(layers: int, count: int = 12) -> tuple[int, ...]:
    """Layers that hear speech, evenly from the first to the last."""
    count = min(count, layers)
    return tuple(round(i * (layers - 1) / max(1, count - 1)) for i in range(count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A model on devices. `height`, `width`: pixels. `ring`: the device of each stage; `decoder`: the VAE's
    own, or None where it shares the last stage's. `link`: GB/s between stages, if not the devices' own.
    `vae_bytes`: of a value in the VAE, which this program computes in float32.
    """

    config: DiTConfig
    height: int
    width: int
    ring: tuple[Gpu, ...]
    decoder: Gpu | None
    dtype: str = "bf16"
    steps: int = 4
    tensor: int = 1
    sessions: int = 1
    link: float | None = None
    ring_blocks: int = 4
    motion: bool = True
    vae_bytes: Literal[2, 4] = 4
    calibration: Calibration = PAPER

    def __post_init__(self) -> None:
        if self.steps % len(self.ring):
            raise UserError(f"{len(self.ring)} stages do not divide {self.steps} steps evenly")
        if self.config.heads % self.tensor:
            raise UserError(f"{self.config.heads} heads cannot be shared by {self.tensor} devices a stage")
        if min(self.height, self.width) < 64:
            raise UserError(f"{self.height}x{self.width}: expected at least 64 pixels a side")

    @property
    def shape(self) -> StreamShape:
        return StreamShape(
            config=self.config,
            height=self.height // 8,
            width=self.width // 8,
            ring_blocks=self.ring_blocks,
            motion=self.motion,
        )

    @property
    def devices(self) -> int:
        return len(self.ring) * self.tensor + (self.decoder is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceLoad:
    """One device's share: seconds of work a tick, bytes by purpose, and whether they fit.

    Of a stage's devices, the fullest: what stands before the pipeline is on the first of all, and a decoder
    without a device of its own on the last.
    """

    role: str
    gpu: Gpu
    work_s: float
    memory: dict[str, float]

    @property
    def total_gb(self) -> float:
        return sum(self.memory.values()) / 1e9

    @property
    def fits(self) -> bool:
        return self.total_gb <= USABLE_MEMORY * self.gpu.memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a setup does. `loads` has one entry a stage, then the decoder's."""

    setup: Setup
    loads: tuple[DeviceLoad, ...]
    forward_tflop: float
    hop_s: float
    packet_bytes: int
    decode_s: float

    @property
    def tick_s(self) -> float:
        """Seconds for a block of each session: the slowest device's work, and the hop to the next."""
        return max(load.work_s for load in self.loads) + self.hop_s

    @property
    def fps(self) -> float:
        """Frames a second of each session, flat out."""
        return BLOCK_FRAMES / self.tick_s

    @property
    def ttff_s(self) -> float:
        """Time to the first frame, an empty pipeline: every step in turn, then the decoder."""
        # Where the decoder has no device of its own, its time is in the last stage's work.
        return sum(load.work_s for load in self.loads) + len(self.setup.ring) * self.hop_s

    @property
    def fits(self) -> bool:
        return all(load.fits for load in self.loads)

    @property
    def hop_gbs(self) -> float:
        """GB/s over each link while blocks go at real time (or as fast as they can)."""
        return self.packet_bytes / max(self.tick_s, BLOCK_FRAMES / VIDEO_FPS) / 1e9

    @property
    def watts(self) -> float:
        """Mean power at 25 frames a second, or flat out where that is slower."""
        period = max(self.tick_s, BLOCK_FRAMES / VIDEO_FPS)
        stages = len(self.setup.ring)
        return sum(
            load.gpu.power
            * (IDLE_POWER + (1 - IDLE_POWER) * min(1.0, load.work_s / period))
            * (self.setup.tensor if index < stages else 1)
            for index, load in enumerate(self.loads)
        )

    @property
    def joules(self) -> float:
        """Energy for one second of one session's video."""
        return self.watts * max(1.0, VIDEO_FPS / self.fps) / self.setup.sessions


def make_plan(setup: Setup) -> Plan:
    """Work out a setup. Nothing is refused for being slow or too large: see `Plan.fits` and `Plan.fps`."""
    shape, local = setup.shape, setup.steps // len(setup.ring)
    last = setup.decoder or setup.ring[-1]
    decode_s = setup.sessions * decode_seconds(setup, last)
    loads = []
    for index, device in enumerate(setup.ring):
        work = setup.sessions * local * forward_seconds(setup, device)
        beside = [front_memory(setup)] if index == 0 else []
        if setup.decoder is None and index == len(setup.ring) - 1:
            work += decode_s
            beside.append(decoder_memory(setup))
        memory = fullest(stage_memory(setup), beside, setup.tensor)
        steps = f"step {index + 1}" if local == 1 else f"steps {index * local + 1}-{(index + 1) * local}"
        loads.append(DeviceLoad(role=steps, gpu=device, work_s=work, memory=memory))
    if setup.decoder is not None:
        loads.append(DeviceLoad(role="decoder", gpu=last, work_s=decode_s, memory=decoder_memory(setup)))
    packet = setup.sessions * shape.packet_bytes(setup.steps)
    link = setup.link or min(device.link for device in [*setup.ring, last])
    hops = setup.devices > 1
    flops = shape.flops(text_cached=setup.calibration.text_cached)
    return Plan(
        setup=setup,
        loads=tuple(loads),
        forward_tflop=sum(flops.values()) / 1e12,
        hop_s=packet / link / 1e9 if hops else 0.0,
        packet_bytes=packet if hops else 0,
        decode_s=decode_s,
    )


def forward_seconds(setup: Setup, device: Gpu) -> float:
    """One denoising step of one session's block.

    Devices that share a stage divide its products and half of the other passes (the residual stream is on all
    of them), and add up partial sums three times a layer and once an injector.
    """
    shape, calibration, n = setup.shape, setup.calibration, setup.tensor
    linear, attention = calibration.rates(device, setup.dtype)
    products = arithmetic_s(shape, linear, attention, text_cached=calibration.text_cached) / n
    passes = calibration.passes * activation_bytes(shape) / device.bandwidth / 1e9
    partial = 2.0 * shape.queries * setup.config.width
    sums = 3 * setup.config.layers + len(setup.config.inject_layers)
    reduce = sums * partial * 2 * (n - 1) / n / device.link / 1e9
    return products + passes * (0.5 + 0.5 / n) + reduce


def decode_seconds(setup: Setup, device: Gpu) -> float:
    """A block of 12 frames through the VAE."""
    rate = setup.calibration.decoder_rate(device, setup.vae_bytes)
    latent = setup.shape.height * setup.shape.width
    pixels = 64 * latent * BLOCK_FRAMES
    flop = DECODER_FLOP * pixels + DECODER_ATTENTION * 3 * latent**2
    traffic = setup.calibration.decoder_passes * decoder_bytes(setup.height, setup.width, setup.vae_bytes)
    return flop / rate / 1e12 + traffic / device.bandwidth / 1e9


def stage_memory(setup: Setup) -> dict[str, float]:
    """Bytes on each device of a stage, by purpose. What a session keeps counts once a session.

    Without logits: attention is the flash kernel's.
    """
    shape, n = setup.shape, setup.tensor
    local = setup.steps // len(setup.ring)
    c = setup.config
    working = 4.0 * setup.sessions * shape.queries * (10 * c.width + 3 * c.ffn_width)
    return {
        "weights": sum(layer_parameters(c).values()) * (1 if setup.dtype == "fp8" else 2) / n
        + 2 * other_parameters(c),
        "rings": setup.sessions * local * shape.ring_bytes() / n,
        "prompt": setup.sessions * shape.text_bytes() / n,
        "working": working / n,
    }


def decoder_memory(setup: Setup) -> dict[str, float]:
    """Bytes of the VAE, its streaming caches, and what decoding a block takes besides."""
    latent = setup.shape.height * setup.shape.width
    return {
        "VAE": setup.vae_bytes * VAE_PARAMETERS,
        "VAE caches": setup.sessions * setup.vae_bytes * DECODER_CACHE * latent,
        "working": _vae_working(setup),
    }


def front_memory(setup: Setup) -> dict[str, float]:
    """Bytes of what a live server has on its first device, before the pipeline: speech model, text encoder,
    and the VAE, which encodes photos in chunks of 12 frames.
    """
    latent = setup.shape.height * setup.shape.width
    return {
        "encoders": SPEECH_WEIGHTS + TEXT_WEIGHTS,
        "VAE": setup.vae_bytes * VAE_PARAMETERS,
        "working": _vae_working(setup) + setup.vae_bytes * ENCODER_CACHE * latent,
    }


def _vae_working(setup: Setup) -> float:
    return VAE_ARRAYS * decoder_bytes(setup.height, setup.width, setup.vae_bytes)


def fullest(stage: dict[str, float], beside: list[dict[str, float]], devices: int) -> dict[str, float]:
    """Bytes on that device of a stage which holds most. Things beside it are on different ones, if there are
    several.
    """
    if devices == 1:
        return functools.reduce(_on_one_device, beside, stage)
    return max((_on_one_device(stage, one) for one in beside), key=lambda m: sum(m.values()), default=stage)


def _on_one_device(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """The VAE is there once, and one program works at a time."""
    once = {key: max(a.get(key, 0.0), b.get(key, 0.0)) for key in ("VAE", "working")}
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in {**a, **b}} | once


def needs(setup: Setup, fps: float, gpus: Sequence[Gpu] = tuple(GPUS.values())) -> list[Plan]:
    """For each kind of device the smallest number that reaches `fps` with this model, if any number does.

    `setup` gives the model and what is asked of it; its devices and layout are replaced: up to a stage a
    step, eight devices a stage, and the decoder's. Ties go to less power.
    """
    found = []
    for device in gpus:
        plans = [make_plan(candidate) for candidate in _layouts(setup, device)]
        enough = [plan for plan in plans if plan.fits and plan.fps >= fps]
        if enough:
            found.append(min(enough, key=lambda plan: (plan.setup.devices, plan.watts)))
    return found


def _layouts(setup: Setup, device: Gpu) -> Iterator[Setup]:
    for stages in (n for n in range(1, setup.steps + 1) if setup.steps % n == 0):
        for tensor in (1, 2, 4, 8):
            for decoder in (None, device):
                if setup.config.heads % tensor == 0:
                    yield dataclasses.replace(setup, ring=(device,) * stages, decoder=decoder, tensor=tensor)
