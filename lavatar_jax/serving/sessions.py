"""The sessions of a server: places and who waits for one, tokens, idleness, and the end of them all."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lavatar_jax.errors import UserError
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.session_host import Busy, SessionHost
from lavatar_jax.inference.spoken import SpokenBlock
from lavatar_jax.serving.config import ServerConfig
from lavatar_jax.serving.encoder import Encoder, video_size
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.metrics import Metrics
from lavatar_jax.serving.room import Identity, Room
from lavatar_jax.serving.security import digest, new_token
from lavatar_jax.serving.state import SavedRooms
from lavatar_jax.serving.watermark import Watermark

log = logging.getLogger(__name__)
NOWHERE = ApiError(401, "unauthorized", "The token is missing or wrong, or the session has ended.")
# Of the time, for the model at most, by the time that a block takes alone. Sessions overlap on several cores,
# which leaves room for enlarging, marking and encoding: on 2 cores two of 37% each lost no frame, three had
# blocks held.
LOAD = 0.8
BUSY = ApiError(503, "busy", "Every place is taken; try again in a moment.", retry_after=5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What a new session is asked to be; checked."""

    image: UInt8[np.ndarray, "H W 3"] = dataclasses.field(repr=False)
    face: str | None
    prompt: str = "a person talking"
    mode: str = "echo"
    seed: int = 0
    record: bool = False
    level: bool = True
    voice: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A new room, with its tokens: they are told once and not kept."""

    room: Room
    token: str = dataclasses.field(repr=False)
    viewer_token: str = dataclasses.field(repr=False)


class Sessions:
    """For the event loop's thread. `start` compiles; `watch` is to run as a task; `stop` ends everything."""

    def __init__(
        self,
        host: SessionHost,
        config: ServerConfig,
        metrics: Metrics,
        sign: Callable[[Path], None] | None = None,
    ) -> None:
        """`sign`: signs a finished recording."""
        model = host.avatar.config
        self.host, self.config, self.metrics, self._sign = host, config, metrics, sign
        self.size = video_size(*host.size, config.rows)
        self.fps = model.fps
        self.listens_to_loudness = model.speech is None  # wav2vec2 normalises by itself
        self.rooms: dict[str, Room] = {}
        self.places = host.slots
        self.ready = self.failed = self.stopping = False
        self._block_seconds = host.avatar.config.dit.block_frames * model.vae.temporal_factor / model.fps
        self._opening = self._waiting = 0
        self._freed = asyncio.Event()
        self._temporary = None if config.recordings else tempfile.TemporaryDirectory(prefix="lavatar-")
        self.recordings = config.recordings or Path(self._temporary.name)  # type: ignore[union-attr]
        self._saved = SavedRooms(config.state) if config.state else None
        self._watermark: Watermark | None = None
        if config.watermark:
            key = config.watermark_key
            self._watermark = Watermark() if key is None else Watermark(key=key)

    # ---- places ----------------------------------------------------------------------------------------

    @property
    def open_rooms(self) -> list[Room]:
        return [room for room in self.rooms.values() if room.reason is None]

    def check_ready(self) -> None:
        """Raises ApiError."""
        if self.stopping:
            raise ApiError(503, "stopping", "The server is shutting down.", retry_after=10)
        if self.failed or (self.ready and not self.host.running):
            raise ApiError(503, "not_available", "The model has failed; the server must be started again.")
        if not self.ready:
            raise ApiError(
                503, "starting", "The model is being compiled; this takes a moment.", retry_after=3
            )

    @property
    def full(self) -> bool:
        return len(self.open_rooms) + self._opening >= self.places

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Holds a place while a session is being opened; with a queue it may wait. Raises ApiError."""
        self.check_ready()
        if self.full:
            await self._queue()
        self._opening += 1
        try:
            yield
        finally:
            self._opening -= 1
            self._freed.set()

    async def _queue(self) -> None:
        if self._waiting >= self.config.queue:
            raise BUSY
        self._waiting += 1
        self.metrics.queue_depth.set(self._waiting)
        try:
            async with asyncio.timeout(self.config.queue_wait):
                while self.full:
                    self._freed.clear()
                    await self._freed.wait()
                    self.check_ready()
        except TimeoutError:
            raise BUSY from None
        finally:
            self._waiting -= 1
            self.metrics.queue_depth.set(self._waiting)

    # ---- sessions --------------------------------------------------------------------------------------

    @staticmethod
    def new_id() -> str:
        return f"s_{secrets.token_hex(8)}"

    async def open(self, wish: Wish, name: str) -> Opened:
        """Within a `place`. Raises ApiError and UserError."""
        token, viewer_token = new_token(), new_token()
        identity = Identity(
            id=name, token=digest(token), viewer_token=digest(viewer_token),
            face=wish.face, voice=wish.voice, level=wish.level,
        )  # fmt: skip
        try:
            session = await asyncio.to_thread(
                self.host.open, wish.image, prompt=wish.prompt, seed=wish.seed, max_delay=None
            )
        except Busy:
            raise BUSY from None
        room = self._furnish(identity, session, wish.prompt, wish.mode)
        if wish.record:
            room.record()
        log.info("session opened", extra={"session": name, "face": wish.face or "uploaded"})
        return Opened(room=room, token=token, viewer_token=viewer_token)

    def _furnish(self, identity: Identity, session: AvatarSession, prompt: str, mode: str) -> Room:
        if self.stopping:  # it began while this one was being opened
            session.close("shutdown")
            self.check_ready()
        room = Room(
            identity, session, Encoder(self.size, self.fps, self.config.bit_rate, self._watermark),
            self.config, self.metrics, fps=self.fps, block_seconds=self._block_seconds,
            level=self.listens_to_loudness, prompt=prompt, mode=mode, recordings=self.recordings,
            sign=self._sign,
        )  # fmt: skip
        self.rooms[identity.id] = room
        return room

    def controlled(self, name: str, token: str) -> Room:
        """The room of its owner's token. Raises ApiError; whether there is such a room is not told."""
        room = self.watched(name, token)
        if not room.may_control(token):
            raise ApiError(403, "viewer_only", "This token can only watch.")
        return room

    def watched(self, name: str, token: str) -> Room:
        """The room that a token may see."""
        room = self.rooms.get(name)
        if room is None:
            digest(token)  # takes as long as for one that there is
            if self._saved is not None and not self.ready:
                self.check_ready()  # it may be among those that are yet to be restored: nobody has ended it
            raise NOWHERE
        if not room.may_watch(token):
            raise NOWHERE
        return room

    # ---- running ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the host, and compiles all that sessions need, by running some."""
        try:
            self.host.start()
            await asyncio.to_thread(self._rehearse)
            if self.config.measure_places:
                self.places = await asyncio.to_thread(self._measure_places)
            self.metrics.places.set(self.places)
            if self._saved is not None:
                await self._restore(self._saved)
        except Exception:
            self.failed = True
            log.exception("the model cannot be started")
            return
        self.metrics.count_recompiles()
        self.ready = True
        log.info("ready", extra={"places": self.places})

    def _rehearse(self) -> None:
        height, width = self.host.size
        grey = np.full((height, width, 3), 128, np.uint8)
        sessions = [self.host.open(grey, prompt=f"rehearsal {slot}") for slot in range(self.host.slots)]
        for session in sessions:
            for block in range(3):
                for _ in range(self.host.parts):
                    self._await_part(session)
                if block == 0:
                    session.set_prompt("another prompt")
                    session.push_audio(np.zeros(16_000, np.float32))
                    session.interrupt()
        for session in sessions:
            session.close("rehearsed")

    def _measure_places(self) -> int:
        """How many sessions this machine holds at full speed: one is timed, alone, for 2 s."""
        height, width = self.host.size
        session = self.host.open(np.full((height, width, 3), 128, np.uint8), prompt="how fast")
        work = median([self._time_block(session) for _ in range(4)])
        session.close("measured")
        places = int(LOAD * self._block_seconds / work)
        log.info("measured", extra={"block_ms": round(1e3 * work), "places_by_speed": places})
        return min(max(1, places), self.host.slots)

    def _time_block(self, session: AvatarSession) -> float:
        """Seconds of work for the next block."""
        parts = [self._await_part(session) for _ in range(self.host.parts)]
        latency = None if parts[-1] is None else parts[-1].latency
        return self._block_seconds if latency is None else latency.complete - latency.taken  # None: too late

    def _await_part(self, session: AvatarSession) -> SpokenBlock | None:
        """Compiling takes as long as it takes, unless the server is stopped meanwhile."""
        while not self.stopping:
            if (part := session.read(timeout=0.5)) is not None:
                return part
            if session.reason is not None:
                raise RuntimeError(f"the rehearsal was closed: {session.reason}")
        return None

    async def watch(self) -> None:
        """Every second: ends what nobody uses, forgets what has ended, tells how it goes."""
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for room in list(self.rooms.values()):
                try:
                    await self._look_after(room, now)
                except Exception:
                    log.exception("looking after a session failed", extra={"session": room.identity.id})
            self.metrics.sessions.set(len(self.open_rooms))
            self.metrics.viewers.set(sum(len(room.connections) for room in self.open_rooms))
            if not self.full:
                self._freed.set()

    async def _look_after(self, room: Room, now: float) -> None:
        if room.closed_at is not None:
            if room.gone.is_set() and now - room.closed_at > self.config.kept:
                del self.rooms[room.identity.id]
                await asyncio.to_thread(room.forget)
            return
        if room.alone_since is not None and now - room.alone_since > self.config.reconnect:
            await room.stop("client_gone")
        elif now - room.voice.active > self.config.idle:
            await room.stop("idle")
        else:
            room.tell_stats()

    async def stop(self) -> None:
        """Tells all clients, closes recordings, saves sessions where that was asked for."""
        if self.stopping:
            return
        self.stopping = True
        self._freed.set()
        reasons = {room: "shutdown" for room in self.open_rooms}
        if self._saved is not None:
            for room in reasons:
                if await self._save(self._saved, room):
                    reasons[room] = "restart"
        await asyncio.gather(*(room.stop(reason) for room, reason in reasons.items()))
        await asyncio.to_thread(self.host.close)
        if self._temporary is not None:
            self._temporary.cleanup()

    async def _save(self, saved: SavedRooms, room: Room) -> bool:
        """Whether it can go on."""
        try:
            await asyncio.to_thread(saved.save, self.host, room.session, room.identity, self._kept_of(room))
        except (UserError, OSError):
            log.exception("a session could not be saved", extra={"session": room.identity.id})
            return False
        return True

    @staticmethod
    def _kept_of(room: Room) -> dict[str, Any]:
        return {"prompt": room.prompt, "mode": "echo" if room.voice.echo else "silent"}

    async def _restore(self, saved: SavedRooms) -> None:
        for identity, kept, session in await asyncio.to_thread(saved.restore, self.host):
            self._furnish(identity, session, kept["prompt"], kept["mode"])
            log.info("session goes on", extra={"session": identity.id})
