"""The LiveKit avatar in a room that is not there: what an agent says comes out with its picture, and ends.

The package's types are stood in for by the few lines that are used of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")

from lavatar_jax.errors import UserError
from lavatar_jax.serving.encoder import Painter
from lavatar_jax.serving.livekit_worker import LiveKit
from lavatar_jax.serving.watermark import Watermark
from tests.serving.fake_host import PARTS, FakeHost


@dataclasses.dataclass
class AudioFrame:
    data: bytes
    sample_rate: int
    num_channels: int
    samples_per_channel: int


@dataclasses.dataclass
class VideoFrame:
    width: int
    height: int
    type: int
    data: bytes


class AudioSegmentEnd: ...


@dataclasses.dataclass
class AvatarOptions:
    video_width: int
    video_height: int
    video_fps: float
    audio_sample_rate: int
    audio_channels: int


class AvatarRunner:
    """Passes an agent's speech to the avatar, and keeps what it plays."""

    def __init__(self, room: Room, *, audio_recv: Any, video_gen: Any, options: AvatarOptions) -> None:
        self.room, self.speech, self.avatar, self.options = room, audio_recv, video_gen, options
        room.runner, self.played, self.closed = self, [], False

    async def start(self) -> None:
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._play())]

    async def _read(self) -> None:
        while True:
            await self.avatar.push_audio(await self.speech.get())

    async def _play(self) -> None:
        async for frame in self.avatar:
            self.played.append(frame)

    async def wait_for_complete(self) -> None:
        await self._tasks[1]

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.closed = True


class Room:
    runner: AvatarRunner

    def __init__(self) -> None:
        self.listeners: dict[str, Any] = {}

    def on(self, event: str, listener: Any) -> None:
        self.listeners[event] = listener


@pytest.fixture
def livekit(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "livekit",
        "livekit.rtc",
        "livekit.agents",
        "livekit.agents.voice",
        "livekit.agents.voice.avatar",
    ]
    modules = {name: ModuleType(name) for name in names}
    rtc, avatar = modules["livekit.rtc"], modules["livekit.agents.voice.avatar"]
    rtc.AudioFrame, rtc.VideoFrame, rtc.VideoBufferType = AudioFrame, VideoFrame, type("T", (), {"I420": 5})
    avatar.AudioSegmentEnd, avatar.VideoGenerator = AudioSegmentEnd, object
    avatar.AvatarOptions, avatar.AvatarRunner = AvatarOptions, AvatarRunner
    modules["livekit"].rtc = rtc
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lavatar_jax.serving.livekit_avatar", raising=False)


def tone(seconds: float, rate: int = 24_000) -> AudioFrame:
    samples = (8000 * np.sin(np.arange(int(seconds * rate)) / 10)).astype(np.int16)
    return AudioFrame(samples.tobytes(), rate, 1, len(samples))


def kinds(frames: list[Any]) -> str:
    return "".join(
        type(frame).__name__[0] if not isinstance(frame, AudioSegmentEnd) else "|" for frame in frames
    )


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen in time")


def loud(frames: list[Any]) -> float:
    """Seconds of sound that can be heard."""
    sounds = [np.frombuffer(frame.data, np.int16) for frame in frames if isinstance(frame, AudioFrame)]
    return sum(len(sound) for sound in sounds if np.abs(sound).max() > 1000) / 16_000


def test_an_agent_speaks_through_it(livekit: None) -> None:
    async def scene() -> None:
        host, room, speech = FakeHost(1), Room(), asyncio.Queue()
        command = LiveKit(url="wss://example.org", rows=128)
        serving = asyncio.ensure_future(command.serve(room, speech, host))
        await until(lambda: hasattr(room, "runner") and len(room.runner.played) > 5)
        runner = room.runner
        assert runner.options == AvatarOptions(128, 128, 25, 16_000, 1)
        assert set(kinds(runner.played)) == {"V"}  # silent: a picture all the time, and no sound
        picture = runner.played[0]
        assert len(picture.data) == 128 * 128 * 3 // 2

        for _ in range(10):
            speech.put_nowait(tone(0.1))
        speech.put_nowait(AudioSegmentEnd())
        await until(lambda: host.opened[0].queued_seconds == 0 and loud(runner.played) > 0.8)
        await until(lambda: "|" in kinds(runner.played))
        assert loud(runner.played) == pytest.approx(1.0, abs=0.15)  # to its end
        said = kinds(runner.played)
        during = said[said.index("A") : said.index("|")]
        assert during.count("A") == pytest.approx(during.count("V"), abs=1)  # in step

        speech.put_nowait(tone(30.0))
        before = len(runner.played)
        await until(lambda: "A" in kinds(runner.played[before:]))
        runner.avatar.clear_buffer()
        await asyncio.sleep(0.5)
        assert host.opened[0].interrupts == 1
        before = len(runner.played)
        await until(lambda: len(runner.played) > before + 5)
        assert set(kinds(runner.played[before:])) == {"V"}

        room.listeners["disconnected"]("left")
        await asyncio.wait_for(serving, 10)
        assert runner.closed
        assert not host.sessions

    asyncio.run(scene())


def test_the_session_ends_and_so_does_the_avatar(livekit: None) -> None:
    async def scene() -> None:
        module = importlib.import_module("lavatar_jax.serving.livekit_avatar")
        session = FakeHost(1).open(np.zeros((16, 16, 3), np.uint8))
        avatar = module.LiveKitAvatar(session, Painter((128, 128), Watermark()), parts=PARTS, level=True)
        session.close()
        assert [frame async for frame in avatar] == []
        await avatar.push_audio(tone(0.1))  # nobody is hurt

    asyncio.run(scene())


def test_it_runs_on_as_many_devices_as_it_is_told(livekit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: str, devices: int) -> None:
        raise UserError(f"{devices} devices for {model}")

    monkeypatch.setattr("lavatar_jax.inference.load_host.prepare_host", prepare)
    monkeypatch.setattr(sys.modules["livekit.agents.voice.avatar"], "DataStreamAudioReceiver", None, False)
    monkeypatch.setenv("LIVEKIT_TOKEN", "x")
    with pytest.raises(UserError, match="3 devices for tiny"):
        LiveKit(url="wss://example.org", devices=3).run()
    with pytest.raises(UserError, match="--devices 0: give a number"):
        LiveKit(url="wss://example.org", devices=0).run()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIVEKIT_TOKEN", raising=False)
    with pytest.raises(UserError, match="LIVEKIT_TOKEN"):
        LiveKit(url="wss://example.org").run()
    monkeypatch.setenv("LIVEKIT_TOKEN", "x")
    with pytest.raises(UserError, match="ws://"):
        LiveKit(url="example.org").run()
    monkeypatch.setitem(sys.modules, "livekit", None)
    with pytest.raises(UserError, match="pip install"):
        LiveKit(url="wss://example.org").run()
