"""What a connected client may ask for in messages: the same words on a data channel and on a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from typing import Any

from lavatar_jax.serving.errors import ApiError, as_api_error
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.uploads import Resampler, pcm16


class Verbs:
    """One connection's conversation. `obey` answers every message, also a wrong one."""

    def __init__(self, room: Room, speech: Any, *, controls: bool) -> None:
        self._room, self._speech, self._controls = room, speech, controls
        self._limits = speech.limits
        self._pieces: Resampler | None = None
        self._malformed = 0
        self.microphone_rate = 16_000

    @property
    def hopeless(self) -> bool:
        """The client does not speak this protocol."""
        return self._malformed >= self._limits.malformed

    def malformed(self) -> None:
        self._malformed += 1

    async def obey(self, text: str | bytes) -> str | None:
        """The answer to one message, in JSON; None: there is nothing to say."""
        name: object = None
        try:
            message = self._parse(text)
            name = message.get("event_id")
            answer = await self._obey(message)
        except Exception as error:
            answer = {"type": "error", "error": as_api_error(error).detail()}
        if answer is None:
            return None
        if isinstance(name, str | int) and len(str(name)) <= 100:
            answer["event_id"] = name
        return json.dumps(answer)

    def _parse(self, text: str | bytes) -> dict[str, Any]:
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            self._malformed += 1
            raise ApiError(400, "bad_request", 'A message is a JSON object with a "type".')
        return message

    async def _obey(self, message: dict[str, Any]) -> dict[str, Any] | None:
        kind, room = message["type"], self._room
        if kind == "ping":
            sent = message.get("t")
            return {"type": "pong", "t": sent if isinstance(sent, int | float) else None}
        if not self._controls:
            raise ApiError(403, "viewer_only", "Viewers can only watch.")
        room.check_open()
        match kind:
            case "agent.speak":
                room.voice.speak(*(await self._speech_of(message)), more=message.get("format") != "file")
            case "agent.speak_end":
                room.voice.speak_end()
            case "agent.say":
                await self._speech.say(room, message.get("text"), message.get("voice"))
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

    async def _speech_of(self, message: dict[str, Any]) -> tuple[Any]:
        audio = message.get("audio")
        if not isinstance(audio, str):
            raise ApiError(422, "invalid", "audio: give sound in base64")
        try:
            data = base64.b64decode(audio, validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(422, "invalid", "audio: this is not base64") from None
        if message.get("format", "pcm16") == "file":
            return (await asyncio.to_thread(self._speech.normalised, data),)
        if message.get("format", "pcm16") != "pcm16":
            raise ApiError(422, "invalid", "format: pcm16 or file")
        rate = _rate(message)
        if self._pieces is None or self._pieces.rate != rate:
            self._pieces = Resampler(rate)
        return (self._pieces(pcm16(data)),)

    def _microphone(self, message: dict[str, Any]) -> None:
        if "sample_rate" in message:
            self.microphone_rate = Resampler(_rate(message)).rate
        if "muted" in message:
            self._room.voice.muted = bool(message["muted"])
            if self._room.voice.muted:
                self._room.voice.microphone_stopped()


def _rate(message: dict[str, Any]) -> int:
    rate = message.get("sample_rate", 16_000)
    if not isinstance(rate, int) or isinstance(rate, bool):
        raise ApiError(422, "invalid", "sample_rate: a whole number")
    return rate
