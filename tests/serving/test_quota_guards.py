"""How long and how much, guard by guard: silence, absence, places, recordings, speech, links."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from lavatar_jax.serving import services, tts
from lavatar_jax.serving.app import FORM_BYTES
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.voice import Voice
from tests.serving.conftest import Served, serving, wait_for, wav


def test_who_is_here_is_not_taken_for_gone(served: Served) -> None:
    session = served.open()
    with session.stream() as raw:
        raw.receive_text()
        wait_for(lambda: session.room.connections)
        served.call(served.services.sessions._look_after, session.room, time.monotonic() + 40.0)
        assert session.room.reason is None
        served.call(served.services.sessions._look_after, session.room, time.monotonic() + 700.0)
        assert session.room.reason["code"] == "idle"


def test_a_microphone_in_a_silent_room_keeps_no_session() -> None:
    session: Any = SimpleNamespace(queued_seconds=0.0, push_audio=len)
    voice = Voice(session, level=True, longest=10.0)
    voice.active = 0.0
    voice.microphone(np.zeros(16_000, np.float32))
    assert voice.active == 0.0
    voice.microphone(np.sin(np.arange(16_000, dtype=np.float32) / 5))
    assert voice.active > 0.0


def test_a_place_is_taken_while_it_is_being_opened(tmp_path: Path) -> None:
    with serving(tmp_path, slots=1) as served:
        sessions = served.services.sessions

        async def two() -> None:
            async with sessions.place():
                with pytest.raises(ApiError, match="Every place"):
                    async with sessions.place():
                        pass

        served.call(two)
        assert not sessions.full


def test_a_busy_server_reads_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, slots=1) as served:
        served.open()
        answer = served.client.post("/v1/sessions", content=b"{")
        assert answer.json()["error"]["code"] == "busy"


def test_only_so_many_wait_for_a_place(tmp_path: Path) -> None:
    with serving(tmp_path, slots=1, queue=1) as served:
        served.open()
        sessions = served.services.sessions

        async def crowd() -> None:
            first = asyncio.ensure_future(sessions._queue())
            await asyncio.sleep(0)
            with pytest.raises(ApiError, match="Every place"):
                await asyncio.wait_for(sessions._queue(), 1.0)
            first.cancel()

        served.call(crowd)


@pytest.mark.parametrize("limits", [{"recording_seconds": 0.2}, {"recording_bytes": 1}])
def test_recordings_of_sessions_are_bounded(tmp_path: Path, limits: dict[str, float]) -> None:
    with serving(tmp_path, limits=limits) as served:
        session = served.open(options={"record": True})
        wait_for(lambda: session.request("GET").json()["recording"]["state"] == "failed")
        assert session.room.recording.error.startswith("the recording is as long as it may be")


def test_uploads_of_sound_are_bounded(tmp_path: Path) -> None:
    """By their own length, whatever waits already."""
    with serving(tmp_path, limits={"sound_seconds": 1.0}) as served:
        session = served.open()
        answer = session.request("POST", "/speak", files={"audio": ("a.wav", wav(1.5))})
        assert answer.status_code == 413
        assert "recording is longer" in answer.json()["error"]["message"]


def test_bodies_with_sound_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, limits={"sound_bytes": 1000}) as served:
        session = served.open()
        assert len(wav(3.0)) > 1000 + FORM_BYTES
        for seconds, status in ((1.0, 202), (3.0, 413)):
            answer = session.request("POST", "/speak", files={"audio": ("a.wav", wav(seconds))})
            assert answer.status_code == status


def test_a_service_that_speaks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answer = SimpleNamespace(read=lambda most=-1: asked.append(most) or wav(0.5))
    opened = contextlib.nullcontext(answer)
    monkeypatch.setattr(tts.urllib.request, "urlopen", lambda request, timeout: opened)
    service = tts.HttpSpeech("http://127.0.0.1")
    assert len(service.speak("hello", "alloy")) == pytest.approx(8000, abs=32)
    assert asked == [tts.LARGEST]
    monkeypatch.setattr(tts, "LONGEST", 0.1)
    with pytest.raises(ApiError):
        service.speak("hello", "alloy")


def test_only_so_many_links_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(services, "time", SimpleNamespace(monotonic=lambda: now))
    tickets, room = services.Tickets(), object()
    names = {tickets.issue(room) for _ in range(1001)}  # type: ignore[arg-type]
    assert min(map(len, names)) >= 43  # cannot be guessed
    with pytest.raises(ApiError, match="Too many links"):
        tickets.issue(room)  # type: ignore[arg-type]
    now = 61.0
    tickets.issue(room)  # type: ignore[arg-type]
    assert len(tickets._tickets) == 1
