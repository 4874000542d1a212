"""What a room knows of those who are connected to it."""

from __future__ import annotations

from typing import Protocol

from lavatar_jax.serving.playout import Viewer


class Connection(Viewer, Protocol):
    """A client's way to a room: a WebRTC call or a WebSocket."""

    controls: bool  # its verbs are obeyed; otherwise it only watches

    def tell(self, event: str) -> None:
        """Sends an event, in JSON. Must not wait."""
        ...

    async def hang_up(self, reason: str) -> None: ...
