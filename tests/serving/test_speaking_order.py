"""Texts are said in the order in which they were given, and not at all after an interruption."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from lavatar_jax.serving import speech
from tests.serving.conftest import Served, Session, serving, wait_for, wav
from tests.serving.sockets import Socket


class SlowTts:
    """What begins with "slow" takes until `go` is set; how long a text is tells what was said."""

    name, voices = "slow", ("one",)

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()

    def speak(self, text: str, voice: str) -> np.ndarray:
        self.begun.append(text)
        if text.startswith("slow"):
            assert self.go.wait(20)
        return np.full(len(text), 0.1, np.float32)


@pytest.fixture
def tts(served: Served) -> Iterator[SlowTts]:
    served.services.speech.tts = found = SlowTts()
    yield found
    found.go.set()


@pytest.fixture
def said(served: Served) -> tuple[Session, list[int]]:
    """A session, and the lengths of what it is given to say."""
    session, lengths = served.open(), []
    voice = session.room.voice
    original: Callable[..., float] = voice.speak

    def speak(samples: np.ndarray, **about: Any) -> float:
        lengths.append(len(samples))
        return original(samples, **about)

    voice.speak = speak
    return session, lengths


def test_a_short_text_does_not_overtake_a_long_one(tts: SlowTts, said: tuple[Session, list[int]]) -> None:
    session, lengths = said
    with ThreadPoolExecutor() as pool:
        first = pool.submit(session.request, "POST", "/speak", json={"text": "slow text"})
        wait_for(lambda: tts.begun)
        second = pool.submit(session.request, "POST", "/speak", json={"text": "short"})
        third = pool.submit(lambda: session.request("POST", "/speak", files={"audio": ("a", wav(0.5))}))
        wait_for(lambda: session.room.voice.making == 3)
        assert not lengths
        tts.go.set()
        answers = [asked.result().json()["seconds"] for asked in (first, second, third)]
    assert lengths[0] == len("slow text")
    assert sorted(lengths[1:]) == [len("short"), 8000]
    assert answers[2] == 0.5  # the file; the texts of a few samples are rounded to nothing
    assert session.room.voice.making == 0


def test_an_interruption_drops_what_is_not_yet_spoken(tts: SlowTts, said: tuple[Session, list[int]]) -> None:
    session, lengths = said
    with ThreadPoolExecutor() as pool:
        first = pool.submit(session.request, "POST", "/speak", json={"text": "slow text"})
        wait_for(lambda: tts.begun)
        second = pool.submit(session.request, "POST", "/speak", json={"text": "too late"})
        wait_for(lambda: session.room.voice.making == 2)
        assert session.request("POST", "/interrupt").status_code == 204
        # What comes afterwards does not wait for what nobody wants to hear any more.
        assert session.request("POST", "/speak", json={"text": "now"}).status_code == 202
        tts.go.set()
        assert [asked.result().json()["seconds"] for asked in (first, second)] == [0, 0]
    assert lengths == [len("now")]
    assert tts.begun == ["slow text", "now"]


def test_a_socket_is_obeyed_while_a_text_is_being_made(tts: SlowTts, said: tuple[Session, list[int]]) -> None:
    session, lengths = said
    with session.stream() as raw:
        socket = Socket(raw)
        socket.say(type="agent.say", text="slow text")
        socket.say(type="agent.say", text="")
        socket.say(type="agent.say", text="next", event_id=1)
        assert socket.event("error")["error"]["code"] == "invalid"
        wait_for(lambda: tts.begun)
        socket.say(type="agent.interrupt")
        socket.event("agent.interrupted")
        socket.say(type="microphone", muted=True)
        socket.say(type="ping", t=1)
        socket.event("pong")
        assert session.room.voice.muted
        tts.go.set()
        wait_for(lambda: session.room.voice.making == 0)
        assert not lengths


def test_half_a_character_is_refused(tts: SlowTts, served: Served) -> None:
    """JSON can say it, and neither files nor answers can."""
    session, half = served.open(), {"Content-Type": "application/json"}
    for method, below, name in (("POST", "/speak", "text"), ("PATCH", "", "prompt")):
        headers = half | session.bearer()
        answer = served.client.request(
            method, session.path + below, content=f'{{"{name}": "hi \\ud83d"}}', headers=headers
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid")
    with session.stream() as raw:
        raw.send_text('{"type": "agent.say", "text": "hi \\ud83d", "event_id": 1}')
        refused = Socket(raw).event("error")
        assert (refused["error"]["code"], refused["event_id"]) == ("invalid", 1)
    assert session.request("POST", "/speak", json={"text": "hi \U0001f600"}).status_code == 202  # both halves
    assert tts.begun == ["hi \U0001f600"]
    answer = served.client.post("/v1/sessions", content='{"prompt": "\\ud83d"}', headers=half)
    assert answer.status_code == 422


def test_a_text_and_a_file_at_once_are_refused(tts: SlowTts, said: tuple[Session, list[int]]) -> None:
    """Only one of them would be said."""
    session, lengths = said
    both = {"data": {"text": "short"}, "files": {"audio": ("a", wav(0.1))}}
    answer = session.request("POST", "/speak", **both)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid")
    assert not lengths
    assert not tts.begun


def test_texts_go_with_who_sent_them(tts: SlowTts, said: tuple[Session, list[int]]) -> None:
    session, lengths = said
    with session.stream() as raw:
        socket = Socket(raw)
        for _ in range(3):
            socket.say(type="agent.say", text="slow text")
        wait_for(lambda: session.room.voice.making == 3)
    wait_for(lambda: session.room.voice.making == 0)
    tts.go.set()
    assert not lengths


def test_two_programs_at_once_whoever_goes(tts: SlowTts, served: Served) -> None:
    """A thread cannot be ended: who goes, or interrupts, does not make room for another program."""
    session, other = served.open(), served.open()
    for _ in range(3):
        with session.stream() as raw:
            Socket(raw).say(type="agent.say", text="slow text")
            wait_for(lambda: session.room.voice.making == 1)
            time.sleep(0.2)
        wait_for(lambda: session.room.voice.making == 0)
    assert tts.begun == ["slow text"] * 2
    with ThreadPoolExecutor() as pool:
        late = pool.submit(other.request, "POST", "/speak", json={"text": "nobody waits for it"})
        wait_for(lambda: other.room.voice.making == 1)
        assert other.request("POST", "/interrupt").status_code == 204
        tts.go.set()
        assert late.result().json()["seconds"] == 0
    assert tts.begun == ["slow text"] * 2


def test_what_takes_long_to_make_keeps_nobody_from_opening_a_session(
    tts: SlowTts, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = threading.Event()

    def decode(data: bytes, longest: float) -> np.ndarray:
        decoding.set()
        assert tts.go.wait(20)
        return np.zeros(1600, np.float32)

    monkeypatch.setattr(speech, "decode_sound", decode)

    async def few_threads() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    served.call(few_threads)
    first = served.open()
    with ThreadPoolExecutor() as pool:
        text = pool.submit(first.request, "POST", "/speak", json={"text": "slow text"})
        wait_for(lambda: tts.begun)
        opened = pool.submit(served.open)
        try:
            file = pool.submit(opened.result(5).request, "POST", "/speak", files={"audio": ("a", wav(0.1))})
            assert decoding.wait(5)
            assert pool.submit(opened.result().request, "DELETE").result(5).status_code == 204
            assert pool.submit(served.open).result(5)
        finally:
            tts.go.set()
        assert text.result().status_code == 202
        assert file.result().status_code == 404  # its session has ended


def test_so_many_texts_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "WAITING", 2)
    with serving(tmp_path) as served:
        served.services.speech.tts = tts = SlowTts()
        session = served.open()
        with session.stream() as raw:
            socket = Socket(raw)
            for number in range(3):
                socket.say(type="agent.say", text="slow text", event_id=number)
            refused = socket.event("error")
            assert (refused["error"]["code"], refused["event_id"]) == ("rate_limited", 2)
            tts.go.set()
            wait_for(lambda: session.room.voice.making == 0)
