"""Keeps a microphone at the loudness that the model knows, while it is spoken into.

A recording can be measured whole (`models.speech_level`); a microphone is measured as it goes: the gain
follows what is spoken, stands still in silence, and what is far below speech is turned down, so that the
noise of a room does not move the mouth.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from jaxtyping import Float

from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.models.speech_level import SPEECH_LEVEL_DB

PIECE = SAMPLE_RATE // 50  # 20 ms
QUIETEST_DB = -55.0  # softer than this is never speech, whoever speaks
SPEECH_RANGE_DB = 25.0  # as in `speech_level_db`: pieces so far below the loudest still belong to speech
ABOVE_NOISE_DB = 8.0  # speech stands out from the room by at least so much
MAX_GAIN_DB, MIN_GAIN_DB = 30.0, -20.0
LEARN_FIRST, LEARN = 0.25, 0.03  # share of a new piece in the level: within 0.2 s at first, then in 0.7 s
REMEMBERED = 200  # pieces: 4 s, longer than anybody holds a vowel
USUAL_ROOM_DB = -45.0  # nobody's room is louder, until that has been heard for so long
HANGOVER = 12  # pieces: ends of words are soft, the gate closes only after 240 ms
CLOSED_DB = -30.0


class RunningLevel:
    """Speech of any loudness in, speech of about -22 dB out, sample for sample, without delay."""

    def __init__(self) -> None:
        self.level_db: float | None = None  # of what was spoken; None: nothing yet
        self._recent: deque[float] = deque(maxlen=REMEMBERED)
        self._learned = 0
        self._hang = 0
        self._gain = 1.0
        self._rest = np.zeros(0, np.float32)

    @property
    def open(self) -> bool:
        """Somebody is speaking, or has just stopped."""
        return self._hang > 0

    @property
    def noise_db(self) -> float:
        """The softest of the last seconds is the room: speech has gaps, if not at once."""
        if len(self._recent) <= HANGOVER:
            return QUIETEST_DB - ABOVE_NOISE_DB
        softest = min(self._recent)
        return softest if len(self._recent) == REMEMBERED else min(softest, USUAL_ROOM_DB)

    @property
    def gain_db(self) -> float:
        if self.level_db is None:
            return 0.0
        return float(np.clip(SPEECH_LEVEL_DB - self.level_db, MIN_GAIN_DB, MAX_GAIN_DB))

    def __call__(self, samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The same number of samples, or up to 20 ms fewer or more: it works in whole pieces."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // PIECE * PIECE
        self._rest = samples[whole:]
        pieces = [self._piece(piece) for piece in samples[:whole].reshape(-1, PIECE)]
        return np.concatenate(pieces) if pieces else samples[:0]

    def _piece(self, piece: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        power = float(np.mean(np.square(piece, dtype=np.float64)))
        piece_db = 10.0 * float(np.log10(max(power, 1e-10)))
        self._recent.append(piece_db)
        if self._is_speech(piece_db):
            self._hang = HANGOVER
            self._learn(piece_db)
        else:
            self._hang = max(0, self._hang - 1)
        gain_db = self.gain_db if self._hang else min(0.0, self.gain_db) + CLOSED_DB
        before, self._gain = self._gain, 10.0 ** (gain_db / 20.0)
        return np.clip(piece * np.linspace(before, self._gain, PIECE, dtype=np.float32), -1.0, 1.0)

    def _is_speech(self, piece_db: float) -> bool:
        loud_enough = piece_db > max(QUIETEST_DB, self.noise_db + ABOVE_NOISE_DB)
        return loud_enough and (self.level_db is None or piece_db > self.level_db - SPEECH_RANGE_DB)

    def _learn(self, piece_db: float) -> None:
        """A mean of powers, in which louder pieces count at once: too loud is worse than too soft."""
        if self.level_db is None:
            self.level_db = piece_db
        share = LEARN_FIRST if self._learned < 10 or piece_db > self.level_db + 10.0 else LEARN
        self._learned += 1
        old, new = 10.0 ** (self.level_db / 10.0), 10.0 ** (piece_db / 10.0)
        if new < old * 10.0**-1.5:  # soft ends of words say little about how loud somebody speaks
            share *= 0.1
        self.level_db = 10.0 * float(np.log10((1.0 - share) * old + share * new))
