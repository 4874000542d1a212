"""What a connected client may ask for in messages: the same words on a data channel and on a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from lavatar_jax.serving.errors import ApiError, as_api_error
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.speech import Samples
from lavatar_jax.serving.uploads import Resampler, pcm16

Answer = dict[str, Any]
Utterance = Coroutine[Any, Any, float]  # being made


class Verbs:
    """One connection's conversation. `obey` answers every message, also a wrong one, by `tell`, which is the
    connection's; `stop` ends what it began."""

    tell: Callable[[str], None]

    def __init__(self, room: Room, speech: Any, *, controls: bool) -> None:
        self._room, self._speech, self._controls = room, speech, controls
        self._limits = speech.limits
        self._pieces: Resampler | None = None
        self._malformed = 0
        self._speaking: set[asyncio.Task[None]] = set()
        self.microphone_rate = 16_000

    @property
    def hopeless(self) -> bool:
        """The client does not speak this protocol."""
        return self._malformed >= self._limits.malformed

    def malformed(self) -> None:
        self._malformed += 1

    async def obey(self, text: str | bytes) -> None:
        """Does what one message asks for, and tells the answer if there is one. Speech that takes long to
        make is not waited for: its client must be able to interrupt it."""
        name: object = None
        try:
            message = self._parse(text)
            name = message.get("event_id")
            answer = await self._obey(message)
        except Exception as error:
            answer = _failure(error)
        if isinstance(answer, Coroutine):
            task = asyncio.get_running_loop().create_task(self._follow(answer, name))
            self._speaking.add(task)
            task.add_done_callback(self._speaking.discard)
        else:
            self._answer(answer, name)

    async def _follow(self, speech: Utterance, name: object) -> None:
        try:
            await speech
        except Exception as error:
            self._answer(_failure(error), name)

    def _answer(self, answer: Answer | None, name: object) -> None:
        if answer is None:
            return
        if isinstance(name, str | int) and len(str(name)) <= 100:
            answer["event_id"] = name
        self.tell(json.dumps(answer))

    def stop(self) -> None:
        for task in self._speaking:
            task.cancel()

    def _parse(self, text: str | bytes) -> dict[str, Any]:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            self._malformed += 1
            raise ApiError(400, "bad_request", 'A message is a JSON object with a "type".')
        return message

    async def _obey(self, message: dict[str, Any]) -> Answer | Utterance | None:
        kind, room = message["type"], self._room
        if kind == "ping":
            sent = message.get("t")
            return {"type": "pong", "t": sent if isinstance(sent, int | float) else None}
        if not self._controls:
            raise ApiError(403, "viewer_only", "Viewers can only watch.")
        room.check_open()
        match kind:
            case "agent.speak":
                if message.get("format") == "file":
                    return self._speech.play(room, _sound(message))
                room.voice.speak(self._piece(message), more=True)
            case "agent.speak_end":
                room.voice.speak_end()
            case "agent.say":
                return self._speech.say(room, message.get("text"), message.get("voice"))
            case "agent.interrupt":
                room.interrupt()
            case "agent.set_prompt" | "set_prompt":
                room.set_prompt(message.get("prompt"))
            case "microphone":
                self._microphone(message)
            case "recording.start":
                room.record()
            case "recording.stop":
                await room.stop_recording()
            case "session.close":
                self._closing = asyncio.get_running_loop().create_task(room.stop("closed"))
            case _:
                self._malformed += 1
                raise ApiError(400, "bad_request", "There is no verb of that name.")
        room.voice.active = time.monotonic()
        return None

    def _piece(self, message: dict[str, Any]) -> Samples:
        data = _sound(message)
        if message.get("format", "pcm16") != "pcm16":
            raise ApiError(422, "invalid", "format: pcm16 or file")
        rate = _rate(message)
        if self._pieces is None or self._pieces.rate != rate:
            self._pieces = Resampler(rate)
        return self._pieces(pcm16(data))

    def _microphone(self, message: dict[str, Any]) -> None:
        if "sample_rate" in message:
            self.microphone_rate = Resampler(_rate(message)).rate
        if "muted" in message:
            self._room.voice.muted = bool(message["muted"])
            if self._room.voice.muted:
                self._room.voice.microphone_stopped()


def _failure(error: Exception) -> Answer:
    return {"type": "error", "error": as_api_error(error).detail()}


def _sound(message: dict[str, Any]) -> bytes:
    audio = message.get("audio")
    if not isinstance(audio, str):
        raise ApiError(422, "invalid", "audio: give sound in base64")
    try:
        return base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(422, "invalid", "audio: this is not base64") from None


def _rate(message: dict[str, Any]) -> int:
    rate = message.get("sample_rate", 16_000)
    if not isinstance(rate, int) or isinstance(rate, bool):
        raise ApiError(422, "invalid", "sample_rate: a whole number")
    return rate
