"""A session over one WebSocket: for browsers without a way for WebRTC, decoded by WebCodecs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from lavatar_jax.serving.encoder import H264_PROFILE
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.playout import Sent
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.sessions import Sessions
from lavatar_jax.serving.speech import Speech
from lavatar_jax.serving.uploads import Resampler, pcm16
from lavatar_jax.serving.verbs import Verbs

PROTOCOL = "lavatar.v1"
HEADER = struct.Struct("<BBHId")  # kind, flags, 0, number, microseconds
VIDEO, AUDIO = 1, 2
KEYFRAME, INSERTED = 1, 2
SILENCE = bytes(1280)  # 40 ms
WAITING = 50  # messages a client may be behind: 1 s
CLOSE_CODES = {401: 4401, 403: 4403, 404: 4404, 429: 4429, 503: 4503}


class Socket:
    """A connection to a room."""

    def __init__(self, socket: WebSocket, room: Room, verbs: Verbs, *, controls: bool, dropped: Any) -> None:
        self.controls = controls
        self._socket, self._room, self._verbs, self._dropped = socket, room, verbs, dropped
        verbs.tell = self.tell
        self._out: asyncio.Queue[bytes | str | None] = asyncio.Queue()
        self._numbers = {VIDEO: 0, AUDIO: 0}
        self._needs_keyframe = True
        self._resampler: Resampler | None = None
        self._code = 1000
        self._over = asyncio.Event()

    def show(self, sent: Sent) -> None:
        moment = sent.moment
        if sent.sound:
            pcm, flags = (SILENCE, INSERTED) if moment is None else (moment.pcm, 0)
            self._put(AUDIO, flags, sent.time, pcm)
        if moment is None:
            return
        if self._needs_keyframe and not moment.keyframe:
            self._numbers[VIDEO] += 1
            return
        self._needs_keyframe = not self._put(VIDEO, KEYFRAME * moment.keyframe, sent.time, moment.video)

    def _put(self, kind: int, flags: int, time: float, payload: bytes) -> bool:
        """False: the client does not keep up, and will miss this."""
        number = self._numbers[kind] & 0xFFFFFFFF
        self._numbers[kind] += 1
        if self._out.qsize() >= WAITING:
            if kind == VIDEO:
                self._dropped.inc()
            return False
        self._out.put_nowait(HEADER.pack(kind, flags, 0, number, 1e6 * time) + payload)
        return True

    def tell(self, event: str) -> None:
        if self._out.qsize() < 4 * WAITING:
            self._out.put_nowait(event)

    async def hang_up(self, reason: str) -> None:
        self._code = 1001 if reason in ("shutdown", "restart") else 1000
        self._out.put_nowait(None)
        await self._over.wait()

    async def run(self) -> None:
        """Until either side has had enough."""
        sending = asyncio.create_task(self._send())
        receiving = asyncio.create_task(self._receive())
        self._room.join(self)
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._room.leave(self)
            self._verbs.stop()
            for task in (sending, receiving):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                    await task
            self._over.set()

    async def _send(self) -> None:
        while (message := await self._out.get()) is not None:
            if isinstance(message, bytes):
                await self._socket.send_bytes(message)
            else:
                await self._socket.send_text(message)
        await self._socket.close(self._code)

    async def _receive(self) -> None:
        while not self._verbs.hopeless:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if (data := message.get("bytes")) is not None:
                self._listen(data)
            else:
                await self._verbs.obey(message.get("text") or "")
        self._code = 4400
        self._out.put_nowait(None)
        await asyncio.sleep(2.0)

    def _listen(self, data: bytes) -> None:
        """A piece of the microphone."""
        try:
            if not self.controls:
                raise ApiError(403, "viewer_only", "Viewers can only watch.")
            rate = self._verbs.microphone_rate
            if not self._room.voice.admits(len(data) / 2 / rate):
                return
            if self._resampler is None or self._resampler.rate != rate:
                self._resampler = Resampler(rate)
            self._room.voice.microphone(self._resampler(pcm16(data)))
        except ApiError as error:
            self._verbs.malformed()
            self.tell(json.dumps({"type": "error", "error": error.detail()}))


async def serve_socket(socket: WebSocket, name: str, sessions: Sessions, speech: Speech) -> None:
    """Lets a client in whose subprotocols name the session's token, or tells why not."""
    offered = socket.scope.get("subprotocols", [])
    token = next((word.removeprefix("token.") for word in offered if word.startswith("token.")), "")
    await socket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
    try:
        if sessions.stopping:
            sessions.check_ready()
        room = sessions.watched(name, token)
        room.check_room_for_more()
    except ApiError as error:
        await socket.send_text(json.dumps({"type": "error", "error": error.detail()}))
        await socket.close(CLOSE_CODES.get(error.status, 4400), error.code)
        return
    height, width = sessions.size
    video = {"codec": H264_PROFILE, "width": width, "height": height, "fps": sessions.fps, "format": "annexb"}
    audio = {"format": "pcm16", "sample_rate": 16_000, "channels": 1}
    controls = room.may_control(token)
    verbs = Verbs(room, speech, controls=controls)
    connection = Socket(socket, room, verbs, controls=controls, dropped=sessions.metrics.dropped_frames)
    connection.tell(json.dumps({"type": "stream.config", "video": video, "audio": audio}))
    await connection.run()  # joins before anything is waited for: until then it does not count
