"""From speech to the `Motion` of a face: the ground truth that the small model learns.

The mouth follows the sound within the context window of the audio features (`LogMelConfig`: at most 2 video
frames ahead), so it can be predicted from them. So can most of the head's motion: people nod and turn with
what they stress. Blinks, gaze and the rest of the sway are random and cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from lavatar_jax.data.faces_render import Motion
from lavatar_jax.models.logmel import LogMelConfig, band_powers

Floats = NDArray[np.float32]

MEL = LogMelConfig()
FRAMES_PER_SECOND = 25

# Loudness of the first formants (bands 3-8, 0.4-1.2 kHz), in dB, that closes and that fully opens the mouth;
# calibrated so that the mean openness while speaking is about 0.37.
FORMANT_BANDS = slice(3, 9)
CLOSED_DB, OPEN_DB = -25.0, -4.0
OPENNESS_POWER = 1.4
# Bands 5-16 (0.7-3.2 kHz) tell front vowels (spread lips) from back vowels (rounded lips).
VOWEL_BANDS = slice(5, 17)
CENTROID_MIDDLE, CENTROID_RANGE = 3.2, 2.4

SMILES = {"neutral": "with a neutral face", "smiling": "smiling"}
HEAD_MOTIONS = {"still": "keeping the head still", "normal": "", "lively": "moving the head a lot"}
SMILE_LEVEL = {"neutral": 0.0, "smiling": 0.9}
SWAY_LEVEL = {"still": 0.12, "normal": 0.5, "lively": 1.5}
BLINKS_PER_MINUTE = 17.0

# The head follows the voice like a damped spring, after about 3 frames: it nods with openness and turns with
# width. Middle and deviation of both responses over the corpus make the two alike in strength.
RESPONSE_FRAMES = 2.0
NOD_MIDDLE, NOD_SPREAD = 0.3, 0.19
TURN_MIDDLE, TURN_SPREAD = 0.54, 0.11


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a person talks; the caption says so in words."""

    smile: str = "neutral"
    head: str = "normal"

    @property
    def caption(self) -> str:
        parts = ["a person talking", SMILES[self.smile], HEAD_MOTIONS[self.head]]
        return ", ".join(part for part in parts if part)


MANNERS = tuple(Manner(smile=smile, head=head) for smile in SMILES for head in HEAD_MOTIONS)


def _hop_kernel() -> Floats:
    """Weights of the hops -4 .. 11 around a frame's own 0 .. 3: a bell, 10 ms ahead of its middle."""
    hops = np.arange(-MEL.hops_per_frame, 3 * MEL.hops_per_frame)
    kernel = np.exp(-0.5 * ((hops - 2.5) / 4.2) ** 2)
    return (kernel / kernel.sum()).astype(np.float32)


def mouth_from_speech(samples: Floats) -> tuple[Floats, Floats]:
    """Openness and width of the mouth, both in [0, 1] (width rests at 0.5), for each of ceil(samples / 640)
    frames.

    Args:
        samples: mono speech [n] at 16 kHz, at about the usual level (`models.speech_level`).
    """
    step = MEL.samples_per_frame
    count = -(-len(samples) // step)
    padded = np.zeros(
        (count + 3) * step + MEL.window - MEL.hop, np.float32
    )  # one silent frame before, two after
    padded[MEL.window - MEL.hop + step :][: len(samples)] = samples
    powers = band_powers(padded, MEL).reshape(-1, MEL.bands)  # [hops, bands]
    loudness_db = 10.0 * np.log10(powers[:, FORMANT_BANDS].sum(axis=1) + 1e-9)
    loudness = np.clip((loudness_db - CLOSED_DB) / (OPEN_DB - CLOSED_DB), 0.0, 1.0)
    logs = np.maximum(np.log10(powers[:, VOWEL_BANDS] + 1e-6) + 4.0, 0.0)
    centroid = (logs * np.arange(logs.shape[1])).sum(axis=1) / np.maximum(logs.sum(axis=1), 1e-3)
    spread = np.clip((centroid - CENTROID_MIDDLE) / CENTROID_RANGE, -1.0, 1.0) * np.sqrt(loudness)
    # The windows of 16 hops that begin one video frame early.
    windows = np.lib.stride_tricks.sliding_window_view(np.stack([loudness, spread]), 16, axis=1)
    loudness_frames, spread_frames = windows[:, :: MEL.hops_per_frame][:, :count] @ _hop_kernel()
    openness = loudness_frames**OPENNESS_POWER
    width = np.clip(0.5 + 0.5 * spread_frames, 0.0, 1.0)
    return openness.astype(np.float32), width.astype(np.float32)


def _smooth_noise(random: np.random.Generator, frames: int, correlation: float) -> Floats:
    """Gaussian noise of unit variance, smoothed over about `correlation` frames."""
    reach = int(4 * correlation) + 1
    noise = gaussian_filter1d(random.standard_normal(frames + 2 * reach), correlation, mode="wrap")
    return (noise[reach : reach + frames] * np.sqrt(2.0 * np.sqrt(np.pi) * correlation)).astype(np.float32)


def blink_track(random: np.random.Generator, frames: int) -> Floats:
    """Lid closure [frames]: random blinks, at least 0.9 s apart, closing in 2 frames, opening in 3."""
    blink = np.zeros(frames, np.float32)
    shortest = 0.9 * FRAMES_PER_SECOND
    mean_gap = 60.0 * FRAMES_PER_SECOND / BLINKS_PER_MINUTE - shortest
    times = np.arange(frames)
    at = -10 * shortest + random.exponential(mean_gap)  # begin early, so that a short clip has the usual rate
    while at < frames + 4:
        since = times - at
        blink = np.maximum(blink, np.clip(1.35 - np.where(since < 0, -since / 2.0, since / 3.0), 0.0, 1.0))
        at += shortest + random.exponential(mean_gap)
    return blink.astype(np.float32)


def gaze_track(random: np.random.Generator, frames: int) -> Floats:
    """Gaze [frames, 2]: mostly at the viewer, with short glances aside."""
    gaze = np.zeros((frames, 2), np.float32)
    at = 0
    while at < frames:
        hold = int(random.uniform(0.6, 3.0) * FRAMES_PER_SECOND)
        aside = random.random() < 0.3
        gaze[at : at + hold] = random.uniform(-0.8, 0.8, 2) if aside else random.normal(0.0, 0.08, 2)
        at += hold
    return gaze


def head_response(track: Floats) -> Floats:
    """What the head makes of a track [frames] of the voice: only of what was said, and slower than the mouth.

    The impulse response is that of a critically damped spring, `t exp(-t / RESPONSE_FRAMES)`.
    """
    times = np.arange(1, 12 * RESPONSE_FRAMES)
    spring = times * np.exp(-times / RESPONSE_FRAMES)
    whole = np.pad(track, (len(spring) - 1, 0), mode="edge")
    return np.convolve(whole, spring / spring.sum(), mode="valid").astype(np.float32)


def talking_motion(openness: Floats, width: Floats, manner: Manner, seed: int) -> Motion:
    """The motion of a person whose mouth moves as given by `mouth_from_speech`: fields [frames].

    The head follows the voice too (four fifths of its variance); everything else is random, deterministic
    by seed.
    """
    frames = len(openness)
    random = np.random.default_rng([seed, 23])
    sway = SWAY_LEVEL[manner.head]
    blink, gaze = blink_track(random, frames), gaze_track(random, frames)
    nod = (head_response(openness) - NOD_MIDDLE) / NOD_SPREAD
    turn = (head_response(width) - TURN_MIDDLE) / TURN_SPREAD
    lean = np.asarray((nod + turn) / 1.7, np.float32)

    def moved(voice: Floats) -> Floats:
        return np.asarray(sway * (0.9 * voice + 0.43 * _smooth_noise(random, frames, 20.0)), np.float32)

    smile = SMILE_LEVEL[manner.smile] + 0.06 * _smooth_noise(random, frames, 12.0)
    fields = {
        "mouth_open": openness,
        "mouth_width": width,
        "smile": np.clip(smile, -0.5, 1.0),
        "blink": blink,
        "gaze_x": gaze[:, 0],
        "gaze_y": gaze[:, 1],
        "brow": np.clip(0.35 * _smooth_noise(random, frames, 9.0), -1.0, 1.0),
        "head_x": np.clip(0.020 * moved(turn), -0.09, 0.09),
        "head_y": np.clip(0.016 * moved(nod), -0.05, 0.05),
        "roll": np.clip(0.035 * moved(lean), -0.13, 0.13),
    }
    return Motion(**{name: jnp.asarray(values, jnp.float32) for name, values in fields.items()})
