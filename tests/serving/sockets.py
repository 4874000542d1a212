"""The page's side of a session's WebSocket, in tests."""

import base64
import json

import numpy as np
from starlette.websockets import WebSocketDisconnect

from lavatar_jax.serving.media_ws import AUDIO, HEADER

TONE = (8000 * np.sin(np.arange(16_000) / 5)).astype("<i2")


class Socket:
    """The page's side of the WebSocket."""

    def __init__(self, socket) -> None:
        self._socket = socket
        self.events: list[dict] = []
        self.media: list[tuple[int, int, int, float, bytes]] = []

    def receive(self) -> None:
        message = self._socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect(message["code"], message.get("reason"))
        if message.get("bytes") is not None:
            kind, flags, zero, number, time_ = HEADER.unpack(message["bytes"][:16])
            assert zero == 0
            self.media.append((kind, flags, number, time_ / 1e6, message["bytes"][16:]))
        else:
            self.events.append(json.loads(message["text"]))

    def event(self, kind: str, **about) -> dict:
        for _ in range(2000):
            for event in self.events:
                if event["type"] == kind and about.items() <= event.items():
                    self.events.remove(event)
                    return event
            self.receive()
        raise AssertionError(f"no {kind}")

    def say(self, **message) -> None:
        self._socket.send_text(json.dumps(message))

    def watch(self, seconds: float) -> None:
        start = len([m for m in self.media if m[0] == AUDIO])
        while len([m for m in self.media if m[0] == AUDIO]) < start + seconds * 25:
            self.receive()


def speak(**changes) -> dict:
    return {"type": "agent.speak", "audio": base64.b64encode(TONE.tobytes()).decode()} | changes
