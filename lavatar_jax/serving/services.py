"""Everything that requests need, in one place: what a server is made of."""

from __future__ import annotations

import dataclasses
import secrets
import time
from typing import Annotated

from fastapi import Depends, Request, WebSocket

from lavatar_jax.serving.config import ServerConfig
from lavatar_jax.serving.consent import ConsentLog
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.faces import Face
from lavatar_jax.serving.limits import Rate
from lavatar_jax.serving.logs import session_id
from lavatar_jax.serving.metrics import Metrics
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.security import bearer, check_api_key
from lavatar_jax.serving.sessions import Sessions
from lavatar_jax.serving.speech import Speech

TICKET_SECONDS = 60


class Tickets:
    """Links that work once, for a minute: a browser's download cannot send a token in a header."""

    def __init__(self) -> None:
        self._tickets: dict[str, tuple[Room, float]] = {}

    def issue(self, room: Room) -> str:
        now = time.monotonic()
        self._tickets = {name: value for name, value in self._tickets.items() if value[1] > now}
        if len(self._tickets) > 1000:
            raise ApiError(429, "rate_limited", "Too many links are waiting to be used.", retry_after=60)
        name = secrets.token_urlsafe(32)
        self._tickets[name] = (room, now + TICKET_SECONDS)
        return name

    def redeem(self, name: str) -> Room:
        room, until = self._tickets.pop(name, (None, 0.0))
        if room is None or time.monotonic() > until:
            raise ApiError(404, "not_found", "This link was used already, or is too old.")
        return room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Services:
    config: ServerConfig
    sessions: Sessions
    metrics: Metrics
    faces: dict[str, Face]
    speech: Speech
    consents: ConsentLog
    creations: Rate
    tickets: Tickets = dataclasses.field(default_factory=Tickets)

    def check_api_key(self, request: Request) -> None:
        check_api_key(request.headers, self.config.api_key)


def services(request: Request) -> Services:
    return request.app.state.services


def services_of(socket: WebSocket) -> Services:
    return socket.app.state.services


async def controlled_room(id: str, request: Request) -> Room:
    """The session of the path, for who holds its token."""
    session_id.set(id)
    return services(request).sessions.controlled(id, bearer(request.headers))


async def watched_room(id: str, request: Request) -> Room:
    """The session of the path, also for who holds its viewers' token."""
    session_id.set(id)
    return services(request).sessions.watched(id, bearer(request.headers))


OwnRoom = Annotated[Room, Depends(controlled_room)]
SeenRoom = Annotated[Room, Depends(watched_room)]
