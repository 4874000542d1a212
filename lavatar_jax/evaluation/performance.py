"""Let a model talk: held-out people, several at once, for seconds or for hours."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from numpy.typing import NDArray

from lavatar_jax.data.speech import read_wav
from lavatar_jax.data.talking_clips import Clip, recording_paths, sample_clip
from lavatar_jax.evaluation.sheet import to_uint8
from lavatar_jax.inference.rollout import Block, rollout
from lavatar_jax.inference.talk import photo_conditions
from lavatar_jax.models.avatar import Avatar, square_size
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.logmel import log_mel
from lavatar_jax.types import BlockInput, Conditions

Floats = NDArray[np.float32]

FIRST_CLIP = 1000  # held-out clips below are for looking during training
CONTEXT = 10  # blocks before a decoded one: all that the causal layers of the small VAE look at


def with_sampling(avatar: Avatar, *, block_frames: int | None = None, **changes: object) -> Avatar:
    """The same weights, sampled in another way; `changes` are fields of `SamplingConfig`."""
    sampling = dataclasses.replace(avatar.config.sampling, **changes)  # type: ignore[arg-type]
    dit, config = avatar.dit, avatar.config.dit
    if block_frames is not None:
        config = dataclasses.replace(config, block_frames=block_frames)
        shapes = jax.eval_shape(lambda: CausalDiT(config, rngs=nnx.Rngs(0)))
        dit = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(dit))
    return avatar._replace(dit=dit, config=dataclasses.replace(avatar.config, sampling=sampling, dit=config))


def block_seconds(avatar: Avatar) -> float:
    return avatar.config.dit.block_frames * avatar.config.vae.temporal_factor / avatar.config.fps


def held_out_clips(avatar: Avatar, count: int, blocks: int, speech: Path) -> list[Clip]:
    """Clips of `blocks` blocks of 12 frames: people, voices and sentences that training never met."""
    size = square_size(avatar)
    return [
        sample_clip(
            FIRST_CLIP + index, 1 + 12 * blocks, size, "heldout", speech=speech, mel=avatar.config.log_mel
        )
        for index in range(count)
    ]


def clip_audio(avatar: Avatar, clips: Sequence[Clip]) -> Iterator[Float[np.ndarray, "B L A T"]]:
    """The clips' own speech, block by block."""
    audio = np.stack([clip.audio for clip in clips])
    step = avatar.config.dit.block_frames * avatar.config.vae.temporal_factor
    for start in range(0, audio.shape[-1] // step * step, step):
        yield audio[..., start : start + step]


def endless_audio(avatar: Avatar, people: int, seconds: float, speech: Path) -> Iterator[Floats]:
    """All held-out recordings in a circle; every person is at another place of it."""
    sound = np.concatenate([read_wav(path) for path in recording_paths(speech, "heldout")])
    features = log_mel(sound, avatar.config.log_mel)
    step = avatar.config.dit.block_frames * avatar.config.vae.temporal_factor
    for block in range(round(seconds / block_seconds(avatar))):
        starts = [(block * step + 1500 * person) % (features.shape[-1] - step) for person in range(people)]
        yield np.stack([features[..., start : start + step] for start in starts])


def stream(
    avatar: Avatar, clips: Sequence[Clip], audio: Iterable[Floats], *, seed: int = 7, decode: bool = True
) -> Iterator[Block]:
    """The people of `clips` as one batch through the rollout; `audio` yields features [B, L, A, T]."""
    pieces = [photo_conditions(avatar, to_uint8(clip.reference), clip.caption) for clip in clips]
    conditions: Conditions = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)
    blocks = (BlockInput(jnp.asarray(features[:, None])) for features in audio)
    vae = avatar.vae if decode else None
    return rollout(avatar.dit, vae, conditions, blocks, avatar.config.sampling, seed=seed)


def talk_clips(avatar: Avatar, clips: Sequence[Clip], *, seed: int = 7, group: int = 4) -> list[Floats]:
    """Videos [T, H, W, 3] of all clips, `group` of them at once."""
    videos: list[Floats] = []
    for start in range(0, len(clips), group):
        people = clips[start : start + group]
        blocks = stream(avatar, people, clip_audio(avatar, people), seed=seed)
        videos += list(np.concatenate([np.asarray(block.frames) for block in blocks], axis=1))
    return videos


def glimpses(
    avatar: Avatar,
    clips: Sequence[Clip],
    speech: Path,
    seconds: float,
    moments: Iterable[float],
    *,
    window: float = 2.4,
    seed: int = 7,
) -> Iterator[tuple[float, Float[np.ndarray, "B T H W 3"]]]:
    """A long video that is decoded only where one looks: (moment, frames of the `window` seconds before it).

    Latents do not depend on what is decoded, so hours cost only the transformer's time.
    """
    length, waiting = block_seconds(avatar), sorted(moments)
    shown = max(1, round(window / length))  # blocks
    recent: deque[jax.Array] = deque(maxlen=CONTEXT + shown)
    audio = endless_audio(avatar, len(clips), seconds, speech)
    for block in stream(avatar, clips, audio, seed=seed, decode=False):
        recent.append(block.latent)
        end = (block.index + 1) * length
        while waiting and end + length > waiting[0]:  # the next block would end after it
            yield waiting.pop(0), decode_last(avatar, list(recent), shown)


def decode_last(avatar: Avatar, latents: Sequence[jax.Array], blocks: int) -> Floats:
    """Frames of the last of some consecutive blocks of latents [B, F, H, W, C], person by person."""
    frames = blocks * latents[-1].shape[1] * avatar.config.vae.temporal_factor
    clip = jnp.concatenate(latents, axis=1)
    people = [_decode(avatar.vae, clip[person : person + 1]) for person in range(len(clip))]
    return np.concatenate([np.asarray(video)[:, -frames:] for video in people])


_decode = jax.jit(lambda vae, latents: jnp.clip(vae.decode(latents), -1, 1))
