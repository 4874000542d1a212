"""Texts and files for an avatar to say, for every way in which they can come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from lavatar_jax.models.speech_level import normalise_level
from lavatar_jax.serving.config import Limits
from lavatar_jax.serving.errors import ApiError, check_text
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.tts import TextToSpeech
from lavatar_jax.serving.uploads import decode_sound

Samples = Float[np.ndarray, " n"]
WAITING = 16  # texts and files of one session


class Speech:
    """`level`: bring recordings to the loudness that the model knows."""

    def __init__(self, tts: TextToSpeech | None, limits: Limits, *, level: bool) -> None:
        self.tts, self.limits, self._level = tts, limits, level
        self._programs = asyncio.Semaphore(2)  # that run at once

    def about(self) -> dict[str, object]:
        """As clients see it."""
        if self.tts is None:
            return {"available": False, "engine": None, "voices": [], "default_voice": None}
        voices = list(self.tts.voices)
        return {"available": True, "engine": self.tts.name, "voices": voices, "default_voice": voices[0]}

    def say(self, room: Room, text: object, voice: object = None) -> Coroutine[Any, Any, float]:
        """Says a text, after all that was asked for earlier. To be awaited: the seconds that it takes; 0:
        it was interrupted before it began. Raises ApiError, at once where the request is wrong."""
        if self.tts is None:
            raise ApiError(501, "not_available", "There is no text-to-speech on this server.")
        text = check_text("text", text, self.limits.text_chars)
        if voice is None:
            voice = room.identity.voice or self.tts.voices[0]
        make = partial(self._synthesise, self.tts, text, check_voice(self.tts, voice))
        return self._in_turn(room, room.voice.turn, make)

    def play(self, room: Room, file: bytes) -> Coroutine[Any, Any, float]:
        """Says a recording, as `say` does a text."""
        return self._in_turn(room, room.voice.turn, partial(asyncio.to_thread, self.normalised, file))

    async def _in_turn(self, room: Room, turn: asyncio.Lock, make: Callable[[], Awaitable[Samples]]) -> float:
        """`turn`: the room's when this was asked for; who waits for it gets it in that order."""
        voice = room.voice
        if voice.making >= WAITING:
            raise ApiError(429, "rate_limited", "Too much waits to be said; try again later.", retry_after=5)
        voice.making += 1
        try:
            async with turn:
                if voice.turn is not turn:
                    return 0.0
                samples = await make()
                room.check_open()
                return voice.speak(samples) if voice.turn is turn else 0.0
        finally:
            voice.making -= 1

    async def _synthesise(self, tts: TextToSpeech, text: str, voice: str) -> Samples:
        async with self._programs:
            return await asyncio.to_thread(tts.speak, text, voice)

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
