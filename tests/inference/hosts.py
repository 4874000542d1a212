"""Session hosts of a random model, with a clock that only moves when told."""

import dataclasses
import functools

import numpy as np

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.session_host import SessionHost
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.parallel import PipelineLayout
from tests.tiny import random_dit, random_vae, tiny_config, tiny_vae_config

SAMPLING = SamplingConfig(
    motion=False, adapt_sink_after=1, prime_latents=2, ring_blocks=2, steps=2, drop_first_frames=0
)
DROPPING = dataclasses.replace(SAMPLING, drop_first_frames=3)
MEL = LogMelConfig(bands=2, pooled=1)
BLOCK = 7680
STAGES = PipelineLayout(stages=2)
SLOTS = 3
ONE = PipelineLayout(stages=1, own_decoder=False)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@functools.cache
def avatar(sampling: SamplingConfig = SAMPLING) -> Avatar:
    dit = tiny_config(audio_dim=MEL.dim, audio_layers=1)
    config = AvatarConfig(
        name="test", image_size=16, dit=dit, vae=tiny_vae_config(), sampling=sampling, log_mel=MEL
    )
    return Avatar(config, random_dit(dit), random_vae(config.vae))


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3)).astype(np.uint8)


def speech(blocks: float, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal(int(blocks * BLOCK))).astype(np.float32)


def make_host(layout: PipelineLayout = ONE, sampling=SAMPLING, name="here") -> SessionHost:
    """An empty host. They are used again: compiling is what takes time. `name` tells two of a kind apart."""
    host = cached_host(layout, sampling, name)
    for session in host.sessions:
        session.close()
    host.clock.now = 1000.0
    return host


@functools.cache
def cached_host(layout: PipelineLayout, sampling: SamplingConfig, name: str) -> SessionHost:
    return SessionHost(avatar(sampling), SLOTS, layout, clock=Clock(), parts=3 if name == "parts" else 1)


def drain(session: AvatarSession) -> list:
    blocks = []
    while (block := session.read()) is not None:
        blocks.append(block)
    return blocks


def run(host: SessionHost, seconds: float, each=None) -> None:
    """Steps as time passes, in ticks of 20 ms of the clock; work itself takes no time."""
    for _ in range(round(seconds / 0.02)):
        if each:
            each()
        while host.step() == 0.0:
            pass
        host.clock.now += 0.02


def frames_of(blocks) -> np.ndarray:
    return np.concatenate([block.frames for block in blocks])


def sound_of(blocks) -> np.ndarray:
    return np.concatenate([block.sound for block in blocks])
