"""Sound that comes faster than anybody speaks, and in pieces that say nothing."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from aiortc.mediastreams import MediaStreamError
from av import AudioFrame

from lavatar_jax.serving import voice as voice_module
from lavatar_jax.serving.media_webrtc import Call
from lavatar_jax.serving.voice import BURST, FASTER, SHORTEST, Voice
from tests.serving.conftest import Served
from tests.serving.sockets import TONE, Socket

SECOND = np.full(16_000, 0.1, np.float32)


def voice(**about: Any) -> Voice:
    session: Any = SimpleNamespace(
        queued_seconds=0.0, reason=None, push_audio=len, end_of_speech=lambda: None, interrupt=lambda: None
    )
    return Voice(session, level=False, longest=10.0, **about)


def test_a_microphone_comes_about_as_fast_as_it_is_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    now, dropped = 1000.0, []
    monkeypatch.setattr(voice_module, "time", SimpleNamespace(monotonic=lambda: now))
    bucket = voice(on_dropped=dropped.append)
    assert sum(bucket.admits(0.25) for _ in range(100)) == BURST / 0.25
    assert sum(dropped) == 25.0 - BURST
    now += 1.0
    assert sum(bucket.admits(0.25) for _ in range(100)) == FASTER / 0.25
    now += 1e4
    assert sum(bucket.admits(0.0) for _ in range(100_000)) == pytest.approx(BURST / SHORTEST, abs=1)
    for _ in range(1000):  # as browsers do
        now += 0.02
        assert bucket.admits(0.02)


def test_a_flood_over_a_websocket_is_dropped_and_counted(served: Served) -> None:
    session = served.open()
    heard = []
    session.room.voice.microphone = lambda samples: heard.append(len(samples))
    with session.stream() as one, session.stream() as other:  # of one session
        begin = time.monotonic()
        for raw in (one, other):
            for _ in range(20):
                raw.send_bytes(TONE.tobytes())
            socket = Socket(raw)
            socket.say(type="ping", t=1)
            socket.event("pong")
        most = BURST + FASTER * (time.monotonic() - begin)
    assert 4 * 16_000 <= sum(heard) <= most * 16_000
    counted = next(
        line for line in served.client.get("/metrics").text.splitlines()
        if line.startswith("lavatar_dropped_microphone_seconds_total")
    )  # fmt: skip
    assert float(counted.split()[1]) == 40 - sum(heard) / 16_000


def test_a_flood_over_webrtc_is_dropped() -> None:
    heard, frame = [], AudioFrame.from_ndarray(np.zeros((1, 48_000), np.int16), "s16", "mono")
    frame.sample_rate = 48_000
    frames = [frame] * 20

    async def recv() -> AudioFrame:
        if not frames:
            raise MediaStreamError
        return frames.pop()

    bucket = voice()
    bucket.microphone = lambda samples: heard.append(len(samples))  # type: ignore[method-assign]
    call: Any = SimpleNamespace(_room=SimpleNamespace(voice=bucket))
    asyncio.run(Call._listen(call, SimpleNamespace(recv=recv)))  # type: ignore[arg-type]
    assert 4 * 16_000 < sum(heard) <= (BURST + 1) * 16_000


def test_what_waits_is_counted_as_it_comes_and_goes() -> None:
    async def body() -> None:
        speaker = voice()
        for _ in range(1000):
            assert speaker.speak(SECOND[:0], more=True) == 0.0
        assert (len(speaker._waiting), speaker._sending) == (0, None)  # there is nothing to say
        speaker._session.queued_seconds = 31.0  # type: ignore[misc]
        speaker._longest = 100.0
        for count in range(1, 8):
            speaker.speak(SECOND)
            assert speaker.queued == 31.0 + count
        speaker.interrupt()
        assert speaker.queued == 31.0
        speaker.speak(np.tile(SECOND, 7))
        speaker._session.queued_seconds = 0.0  # type: ignore[misc]
        async with asyncio.timeout(10):
            while speaker._sending is not None:
                await asyncio.sleep(0.01)
        assert speaker.queued == 0.0

    asyncio.run(body())


def test_pieces_too_short_to_be_levelled_wait_for_the_next() -> None:
    async def body() -> None:
        speaker = voice()
        speaker._level = True
        speaker._session.queued_seconds = 31.0  # type: ignore[misc]
        speaker._longest = 100.0
        for _ in range(320):
            speaker.speak(SECOND[:1], more=True)
        assert [len(piece) for piece in speaker._waiting] == [320]
        assert speaker.queued == pytest.approx(31.02)
        speaker.stop()

    asyncio.run(body())
