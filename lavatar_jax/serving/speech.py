"""Texts and files for an avatar to say, for every way in which they can come."""

from __future__ import annotations

import asyncio

import numpy as np
from jaxtyping import Float

from lavatar_jax.models.speech_level import normalise_level
from lavatar_jax.serving.config import Limits
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.tts import TextToSpeech
from lavatar_jax.serving.uploads import decode_sound

Samples = Float[np.ndarray, " n"]


class Speech:
    """`level`: bring recordings to the loudness that the model knows."""

    def __init__(self, tts: TextToSpeech | None, limits: Limits, *, level: bool) -> None:
        self.tts, self.limits, self._level = tts, limits, level
        self._speaking = asyncio.Semaphore(2)  # programs that run at once

    def about(self) -> dict[str, object]:
        """As clients see it."""
        if self.tts is None:
            return {"available": False, "engine": None, "voices": [], "default_voice": None}
        voices = list(self.tts.voices)
        return {"available": True, "engine": self.tts.name, "voices": voices, "default_voice": voices[0]}

    async def say(self, room: Room, text: object, voice: object = None) -> float:
        """Returns the seconds that it takes to say a text. Raises ApiError."""
        if self.tts is None:
            raise ApiError(501, "not_available", "There is no text-to-speech on this server.")
        if not isinstance(text, str) or not 0 < len(text.strip()) <= self.limits.text_chars:
            raise ApiError(422, "invalid", f"text: give 1 to {self.limits.text_chars} characters")
        if voice is None:
            voice = room.identity.voice or self.tts.voices[0]
        voice = check_voice(self.tts, voice)
        async with self._speaking:
            samples = await asyncio.to_thread(self.tts.speak, text, voice)
        room.check_open()
        return room.voice.speak(samples)

    def normalised(self, data: bytes) -> Samples:
        """A recording as it is pushed; blocks. Raises ApiError."""
        samples = decode_sound(data, self.limits.sound_seconds)
        return normalise_level(samples) if self._level else samples


def check_voice(tts: TextToSpeech | None, voice: object) -> str:
    """Raises ApiError for a voice that there is not: names go into command lines."""
    if tts is None or not isinstance(voice, str) or voice not in tts.voices:
        known = ", ".join(tts.voices) if tts else "none"
        raise ApiError(422, "invalid", f"voice: one of {known}")
    return voice
