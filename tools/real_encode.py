"""From cut-out pieces of real videos to training records, by the encoders of a model."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from lavatar_jax.checkpoints.store import load_config, load_encoders, load_text_encoder, model_folder
from lavatar_jax.data.clip_filters import (
    FPS,
    NO_REFERENCE,
    FilterConfig,
    clip_starts,
    reference_frame,
    shortest_piece,
)
from lavatar_jax.data.records import Record
from lavatar_jax.data.references import other_light
from lavatar_jax.errors import UserError
from lavatar_jax.inference.encode import frame_chunks
from lavatar_jax.inference.images import size_less_than_area
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.models.avatar import AvatarConfig
from lavatar_jax.models.logmel import log_mel
from lavatar_jax.models.speech_level import normalise_level
from lavatar_jax.models.vae import CausalVAE
from tools.real_clips import Outcome, Piece, where

CAPTIONS = 1000  # whose states are kept, of up to 4 MB each


def target_sizes(config: AvatarConfig) -> tuple[tuple[int, int], ...]:
    """(height, width) of training pictures: the model's square, or its area lying, standing and square."""
    size = config.image_size
    if isinstance(size, int):
        return ((size, size),)
    height, width = size
    area = height * width
    shapes = ((height, width), (width, height), (int(area**0.5),) * 2)
    return tuple(dict.fromkeys(size_less_than_area(*shape, area) for shape in shapes))


@functools.partial(jax.jit, static_argnames="first", donate_argnames="cache")
def _encode_chunk(
    vae: CausalVAE, video: jax.Array, cache: Any, *, first: bool
) -> tuple[jax.Array, jax.Array, Any]:
    pixels = video.astype(jnp.float32) / 127.5 - 1.0
    mean, log_variance, cache = vae.stream_encode_distribution(pixels[None], cache, first=first)
    return mean[0], jnp.exp(0.5 * log_variance).mean(axis=(0, 2, 3)), cache


def _encode(
    vae: CausalVAE, video: UInt8[np.ndarray, "T H W 3"]
) -> tuple[Float[np.ndarray, "F h w Z"], Float[np.ndarray, " Z"]]:
    """Raw means of a clip, and the encoder's own deviation; a chunk at a time, as long clips need."""
    cache, means, spreads = None, [], []
    for piece in frame_chunks(vae, len(video)):
        mean, spread, cache = _encode_chunk(vae, jnp.asarray(video[piece]), cache, first=cache is None)
        means.append(np.asarray(mean, np.float32))
        spreads.append(np.asarray(spread, np.float32))
    return np.concatenate(means), np.concatenate(spreads).mean(axis=0)


def perturbed(photo: UInt8[np.ndarray, "H W 3"], name: str, share: float) -> UInt8[np.ndarray, "H W 3"]:
    """A record's reference; in this share of records, which their names decide, in another light.

    Its pose is another one than the clip's anyway, as it is of another time (method section 6).
    """
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if random.random() >= share:
        return photo
    lit = other_light(photo.astype(np.float32) / 127.5 - 1.0, random)
    return np.round(127.5 * (lit + 1.0)).astype(np.uint8)


class ClipEncoder:
    """The VAE, the ear and the reader of prompts of a model (`--model` of the other programs).

    `other_light`: share of references in another light than their clip. `pixels`: frames of each clip that
    are kept as they are, for stage 0.
    Raises UserError where the folder is none, or damaged, and for `pixels` that stage 0 cannot encode.
    """

    def __init__(
        self,
        model: str,
        *,
        blocks: int,
        motion_frames: int,
        filters: FilterConfig,
        other_light: float = 0.0,
        pixels: int = 0,
    ) -> None:
        self.folder: Path = model_folder(model)
        self.config = load_config(self.folder)
        self.sizes = target_sizes(self.config)
        self.motion_frames, self.filters, self.other_light = motion_frames, filters, other_light
        self.clip_frames = blocks * self.config.dit.block_frames * self.config.vae.temporal_factor
        factor = self.config.vae.temporal_factor
        if pixels and not (1 <= pixels <= self.clip_frames and pixels % factor == 1):
            raise UserError(
                f"--pixels must be 1 + {factor}k and at most a clip's {self.clip_frames} frames (--blocks), "
                f"not {pixels}"
            )
        self.pixels = pixels
        self.shortest = shortest_piece(motion_frames, self.clip_frames, filters)
        self._vae, self._speech = load_encoders(self.folder, self.config)
        self._text: dict[str, np.ndarray | None] = {}

    @property
    def about(self) -> dict[str, object]:
        """For `dataset.json`: what the records depend on."""
        return {
            "source": "videos",
            "model": self.config.name,
            "vae": dataclasses.asdict(self.config.vae),
            "clip_frames": self.clip_frames,
            "motion_frames": self.motion_frames,
            "other_light": self.other_light,
            "pixels": self.pixels,
        }

    def records(self, outcome: Outcome, piece: Piece, done: set[str]) -> Iterator[tuple[int, Record]]:
        """(first frame in the video at 25 a second, record) of a piece's clips, end to end, without those
        in `done`. Clips without a reference are noted in `outcome`."""
        frames = np.load(piece.frames, mmap_mode="r")
        starts = clip_starts(len(frames), self.motion_frames, self.clip_frames)
        poses = None if piece.pose is None else np.load(piece.pose, mmap_mode="r")
        features: np.ndarray | None = None
        motion_latents = (self.motion_frames - 1) // self.config.vae.temporal_factor + 1
        for start in starts:
            name = f"{outcome.name}-{piece.start + start:06d}"
            first, stop = start + self.motion_frames, start + self.motion_frames + self.clip_frames
            away = reference_frame(start, stop, len(frames), name=name, config=self.filters)
            if away is None:
                outcome.dropped.append((where(piece.start + first, piece.start + stop), NO_REFERENCE))
                continue
            if name in done:
                continue
            if features is None:
                # Not what is behind the last clip: the speech encoder compiles anew for every length.
                heard = starts[-1] + self.motion_frames + self.clip_frames
                features = self.hear(np.load(piece.samples), len(frames) if self._speech is None else heard)
            latent, spread = _encode(self._vae, frames[start:stop])
            photo = perturbed(frames[away], name, self.other_light)
            reference, _ = _encode(self._vae, photo[None])
            record: Record = {
                "id": name,
                "caption": outcome.caption,
                "latent": latent[motion_latents:].astype(np.float16),
                "motion": latent[:motion_latents].astype(np.float16),
                "reference": reference.astype(np.float16),
                "spread": spread.astype(np.float16),
                "audio": features[..., first:stop].astype(np.float16),
            }
            if poses is not None:
                record["pose"] = self.encode_pose(poses[first:stop]).astype(np.float16)
            if self.pixels:
                record["pixels"] = frames[first : first + self.pixels]
                record["face"] = np.array(piece.place, np.float32)
            text = self.read(outcome.caption)
            yield piece.start + first, record if text is None else {**record, "text": text}

    def encode_pose(self, video: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "F h w Z"]:
        """Raw means of a clip's poses, encoded as `PoseEncoder` does when a video is made: so many frames as
        its clips have by themselves, behind one copy of their first, whose latent is dropped."""
        config = self.config
        length = config.sampling.clip_blocks * config.dit.block_frames * config.vae.temporal_factor
        parts = [video[start : start + length] for start in range(0, len(video), length)]
        return np.concatenate([_encode(self._vae, np.concatenate([part[:1], part]))[0][1:] for part in parts])

    def hear(self, samples: np.ndarray, frames: int) -> np.ndarray:
        """Features [L, A, frames] of the beginning of a piece's sound, heard as when a video is made."""
        samples = samples[: frames * SAMPLE_RATE // FPS]
        if self._speech is None:
            features = log_mel(normalise_level(samples), self.config.log_mel)
        else:
            from lavatar_jax.inference.speech_features import speech_features

            features = speech_features(self._speech, samples, self.clip_frames, fps=FPS)
        missing = max(0, frames - features.shape[-1])
        return np.pad(features, ((0, 0), (0, 0), (0, missing)))[..., :frames]

    def read(self, caption: str) -> np.ndarray | None:
        """States [S, E] of a caption up to its true length; None for models without a text encoder."""
        if self.config.text is None:
            return None
        if caption not in self._text:
            if len(self._text) >= CAPTIONS:
                self._text.clear()
            from lavatar_jax.inference.prompt import PromptTokenizer, encode_prompt

            if not hasattr(self, "_reader"):
                self._reader = load_text_encoder(self.folder, self.config)
                self._tokenizer = PromptTokenizer(self.folder / "tokenizer", self.config.dit.text_len)
            length = self.config.dit.text_len
            states = encode_prompt(self._reader, self._tokenizer, caption, length)
            count = int(self._tokenizer([caption])[1].sum())
            self._text[caption] = np.asarray(states[0, :count], np.float16)
        return self._text[caption]
