"""One session with everything around it: who is connected, what is said to them, its recording, its end."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavatar_jax.errors import UserError
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.serving.broadcast import Broadcast
from lavatar_jax.serving.config import ServerConfig
from lavatar_jax.serving.connection import Connection
from lavatar_jax.serving.encoder import Encoder
from lavatar_jax.serving.errors import ApiError, check_text
from lavatar_jax.serving.metrics import Metrics
from lavatar_jax.serving.playout import Playout, Sent
from lavatar_jax.serving.recording import Recording
from lavatar_jax.serving.security import same
from lavatar_jax.serving.voice import Voice

log = logging.getLogger(__name__)
MODES = ("echo", "silent")
NO_RECORDING = {"state": "off", "seconds": 0.0, "bytes": 0, "signed": False}
SPEECH_ENDS = 0.4  # seconds of silence
COMPLETING = 4.0  # seconds that clients wait for the end of a recording before they are told of the session's

REASONS = {
    "closed": "The session was closed.",
    "idle": "Nothing was said for a long time.",
    "client_gone": "The client did not come back.",
    "shutdown": "The server stops.",
    "restart": "The server restarts; the session goes on when it is back.",
    "failed": "The session failed; start a new one.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What a room is, and what it survives a restart with. Of its tokens only digests are kept."""

    id: str
    token: bytes = dataclasses.field(repr=False)
    viewer_token: bytes = dataclasses.field(repr=False)
    face: str | None
    voice: str | None = None
    level: bool = True


class Room:
    """For the event loop's thread. `stop` ends it; `gone` is set when everything of it has ended."""

    def __init__(
        self,
        identity: Identity,
        session: AvatarSession,
        encoder: Encoder,
        config: ServerConfig,
        metrics: Metrics,
        *,
        fps: int,
        block_seconds: float,
        level: bool,
        prompt: str,
        mode: str,
        recordings: Path,
        sign: Callable[[Path], None] | None = None,
    ) -> None:
        self.identity, self.session, self.prompt = identity, session, prompt
        self.connections: list[Connection] = []
        self.reason: dict[str, str] | None = None
        self.alone_since: float | None = time.monotonic()
        self.closed_at: float | None = None
        self.gone = asyncio.Event()
        self.calls: dict[str, Any] = {}
        self.playout = Playout(fps, config.delay, on_underrun=metrics.underruns.inc, on_sent=self._on_sent)
        self.voice = Voice(
            session, level=level and identity.level, longest=config.limits.sound_seconds,
            on_done=lambda: self.tell({"type": "agent.speak_done"}),
            on_dropped=metrics.dropped_microphone.inc,
        )  # fmt: skip
        self._size, self._fps = (encoder.video.height, encoder.video.width), fps
        self._config, self._metrics, self._folder, self._sign = config, metrics, recordings, sign
        self._created = datetime.datetime.now(datetime.UTC)
        self._started = time.monotonic()
        self._first_frame_ms: float | None = None
        self._silence_to_speech_ms: float | None = None
        self._spoke_at = 0.0
        self._completing = threading.Lock()
        self._recorded = 0  # files
        self._telling: set[asyncio.Task[None]] = set()
        self._speaking_until: float | None = None
        self._sent_at: deque[float] = deque(maxlen=2 * fps)
        self._broadcast = Broadcast(
            session, encoder, self.playout, metrics,
            name=identity.id, block_seconds=block_seconds,
            on_end=self._ended, on_recording_failed=self._recording_failed,
        )  # fmt: skip
        self._playing = asyncio.get_running_loop().create_task(self.playout.run())
        self.set_mode(mode)

    # ---- who is here -----------------------------------------------------------------------------------

    def may_control(self, token: str) -> bool:
        return same(token, self.identity.token)

    def may_watch(self, token: str) -> bool:
        owner, viewer = same(token, self.identity.token), same(token, self.identity.viewer_token)
        return owner or viewer

    def check_room_for_more(self) -> None:
        """Raises ApiError when too many are connected, or nobody can be any more."""
        self.check_open()
        calling = sum(call not in self.connections for call in self.calls.values())
        if len(self.connections) + calling >= self._config.limits.connections:
            raise ApiError(429, "rate_limited", "Too many connections watch this session.", retry_after=10)

    def check_open(self) -> None:
        if self.reason is not None:
            raise ApiError(404, "not_found", f"The session has ended. {self.reason['message']}")

    def join(self, connection: Connection) -> None:
        self.connections.append(connection)
        self.playout.viewers.append(connection)
        self.alone_since = None
        self._broadcast.force_keyframe()
        self._log("client connected", way=type(connection).__name__, controls=connection.controls)
        connection.tell(json.dumps({"type": "session.state", "session": self.about()}))
        self.tell_state()

    def leave(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)
            self._log("client gone", way=type(connection).__name__)
            self.playout.viewers.remove(connection)
            if connection.controls:
                self.voice.microphone_stopped()
            if not self.connections:
                self.alone_since = time.monotonic()
            self.tell_state()

    def _log(self, message: str, **about: object) -> None:
        log.info(message, extra={"session": self.identity.id, **about})

    # ---- what is said ----------------------------------------------------------------------------------

    def tell(self, event: dict[str, Any]) -> None:
        """An event for everybody."""
        text = json.dumps(event)
        for connection in list(self.connections):
            connection.tell(text)

    def tell_state(self) -> None:
        if self.reason is None:  # else the last word is `session.closed`
            self.tell({"type": "session.state", "session": self.about()})

    def tell_stats(self) -> None:
        level = self.voice.microphone_level
        loudness = None if level.level_db is None else round(level.level_db, 1)
        microphone = {"level_db": loudness, "gain_db": round(level.gain_db, 1), "open": level.open}
        about = self.about()
        shared = {
            name: about[name]
            for name in ("stats", "speaking", "queued_ms", "clients", "viewers", "recording")
        }
        self.tell({"type": "stats", **shared, "microphone": microphone})

    @property
    def state(self) -> str:
        if self.reason is not None:
            return "closed"
        return "live" if self.connections else "waiting"

    def about(self) -> dict[str, Any]:
        """The session as clients see it."""
        about = {
            "id": self.identity.id,
            "state": self.state,
            "created": self._created.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "seconds": round((self.closed_at or time.monotonic()) - self._started, 1),
            "face": self.identity.face,
            "prompt": self.prompt,
            "mode": "echo" if self.voice.echo else "silent",
            "clients": sum(connection.controls for connection in self.connections),
            "viewers": sum(not connection.controls for connection in self.connections),
            "speaking": self._speaking_until is not None,
            "queued_ms": round(1e3 * self.voice.queued),
            "recording": self.recording.about() if self.recording else NO_RECORDING,
            "stats": self._stats(),
        }
        return about if self.reason is None else about | {"reason": self.reason}

    def _stats(self) -> dict[str, Any]:
        stats, sent = self.session.stats, self._sent_at
        fps = (len(sent) - 1) / (sent[-1] - sent[0]) if len(sent) > 1 and sent[-1] > sent[0] else 0.0
        factor = self._broadcast.real_time_factor
        return {
            "fps": round(fps, 1),
            "first_frame_ms": self._first_frame_ms,
            "silence_to_speech_ms": self._silence_to_speech_ms,
            "parts_ms": self._broadcast.parts_ms,
            "block_ms": self._broadcast.block_ms,
            "real_time_factor": None if factor is None else round(factor, 3),
            "held": stats.held,
            "underruns": self.playout.underruns,
            "speech_gaps": stats.underruns,
            "dropped_frames": stats.dropped_frames,
            "bytes": self._broadcast.bytes,
        }

    def _on_sent(self, sent: Sent) -> None:
        if sent.moment is None:
            return
        now = time.monotonic()
        self._metrics.frames.inc()
        self._sent_at.append(now)
        if self._first_frame_ms is None:
            self._first_frame_ms = round(1e3 * (now - self.session.stats.opened), 1)
        # A second sentence that came with the first had to wait for it: that is no silence.
        if sent.moment.speech is not None and sent.moment.speech > self._spoke_at:
            wait = now - sent.moment.speech
            self._metrics.silence_to_speech.observe(wait)
            self._silence_to_speech_ms = round(1e3 * wait, 1)
        if sent.moment.loud:
            self._spoke_at = now
            if self._speaking_until is None:
                self.tell({"type": "agent.speech_started", "time": round(sent.time, 3)})
            self._speaking_until = sent.time + SPEECH_ENDS
        elif self._speaking_until is not None and sent.time > self._speaking_until:
            self._speaking_until = None
            self.tell({"type": "agent.speech_ended", "time": round(sent.time, 3)})

    # ---- what can be asked -----------------------------------------------------------------------------

    def set_prompt(self, prompt: object) -> None:
        prompt = check_text("prompt", prompt, self._config.limits.prompt_chars)
        self.session.set_prompt(prompt)
        self.prompt, self.voice.active = prompt, time.monotonic()
        self.tell({"type": "prompt.updated", "prompt": prompt})

    def set_mode(self, mode: object) -> None:
        if mode not in MODES:
            raise ApiError(422, "invalid", f"mode: one of {', '.join(MODES)}")
        self.voice.echo = mode == "echo"

    def interrupt(self) -> None:
        self.voice.interrupt()
        self.tell({"type": "agent.interrupted"})

    # ---- recording -------------------------------------------------------------------------------------

    @property
    def recording(self) -> Recording | None:
        return self._broadcast.recording

    def record(self) -> Recording:
        """Begins a new file. Raises ApiError while one is being written."""
        self.check_open()
        if self.recording is not None and self.recording.state == "on":
            raise ApiError(409, "conflict", "The session is being recorded already.")
        # A file of its own: the one before may still be signed, or on its way to somebody.
        limits, before = self._config.limits, self.recording
        path = self._folder / f"{self.identity.id}{f'-{self._recorded}' if self._recorded else ''}.mp4"
        path.unlink(missing_ok=True)
        recording = Recording(
            path, size=self._size, fps=self._fps,
            seconds=limits.recording_seconds, nbytes=limits.recording_bytes,
        )  # fmt: skip
        self._broadcast.recording, self._recorded = recording, self._recorded + 1
        if before is not None:
            before.path.unlink(missing_ok=True)
        self._broadcast.force_keyframe()
        self.tell({"type": "recording.started"})
        return recording

    async def stop_recording(self) -> Recording:
        recording = self.recording
        if recording is None:
            raise ApiError(404, "not_found", "There is no recording of this session.")
        was_on = recording.state == "on"
        await self.completed(recording)
        if was_on and recording is self.recording:  # else the next one is running, which has been told
            self.tell({"type": "recording.stopped", "recording": recording.about()})
        return recording

    async def completed(self, recording: Recording) -> None:
        """Ends a recording, and waits until it is signed."""
        await asyncio.to_thread(self._complete, recording)

    def _complete(self, recording: Recording) -> None:
        """Closes and signs a recording, once; blocks."""
        recording.close()
        with self._completing:
            if self._sign is None or recording.signed or not recording.frames:
                return
            try:
                self._sign(recording.path)
                recording.signed = True
            except UserError as error:
                log.warning("%s", error, extra={"session": self.identity.id})
            finally:
                if recording is not self.recording:  # the next one has begun, and nobody can ask for it
                    recording.path.unlink(missing_ok=True)

    def _recording_failed(self, recording: Recording, message: str) -> None:
        log.warning("recording failed: %s", message, extra={"session": self.identity.id})
        telling = asyncio.get_running_loop().create_task(self._tell_failed(recording, message))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _tell_failed(self, recording: Recording, message: str) -> None:
        """Once it is signed: who is told may ask for it at once."""
        await self.completed(recording)
        if recording is self.recording:
            error = {"code": "not_available", "message": message}
            self.tell({"type": "recording.failed", "error": error})

    # ---- the end ---------------------------------------------------------------------------------------

    def _ended(self) -> None:
        """The session itself is over: it failed, or the host was closed."""
        if self.reason is None:
            log.warning("session failed: %s", self.session.reason, extra={"session": self.identity.id})
            self._closing = asyncio.get_running_loop().create_task(self.stop("failed"))

    async def stop(self, code: str) -> None:
        """Completes the recording, tells everybody, hangs up. A second call waits for the first.

        Who is told may ask for the recording at once, so it is complete by then, unless that takes very long.
        """
        if self.reason is not None:
            await self.gone.wait()
            return
        self.reason = {"code": code, "message": REASONS[code]}
        self.closed_at = time.monotonic()
        self._metrics.closed.labels(code).inc()
        self._log("session closed", reason=code)
        try:
            self.session.close(code)
            self.voice.stop()
            completing = asyncio.create_task(asyncio.to_thread(self._complete_last))
            await asyncio.wait({completing}, timeout=COMPLETING)
            self.tell({"type": "session.closed", "reason": self.reason})
            await asyncio.sleep(0.05)  # last words are on their way
            leaving = {*self.connections, *self.calls.values()}
            goodbyes = (asyncio.wait_for(connection.hang_up(code), 2.0) for connection in leaving)
            await asyncio.gather(*goodbyes, return_exceptions=True)  # some may be gone already
            self._playing.cancel()
            await asyncio.gather(completing, *self._telling)
        finally:
            self.gone.set()

    def _complete_last(self) -> None:
        """Waits for the last frames, and completes what they are recorded in; blocks."""
        self._broadcast.join()
        if self.recording is not None:
            self._complete(self.recording)

    def forget(self) -> None:
        """Removes its recording."""
        if self.recording is not None:
            self.recording.path.unlink(missing_ok=True)
