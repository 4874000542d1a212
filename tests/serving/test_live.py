"""The whole chain with real parts: a model, uvicorn on loopback, WebRTC clients."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

import aioice.ice
import av
import httpx2
import websockets
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.session_host import SessionHost
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.parallel import PipelineLayout
from lavatar_jax.serving.app import create_app
from lavatar_jax.serving.config import Limits, ServerConfig
from lavatar_jax.serving.encoder import VideoEncoder
from lavatar_jax.serving.server import Server, make_server
from tests.serving.conftest import wait_for
from tests.tiny import random_dit, random_vae, tiny_config, tiny_vae_config

MEL = LogMelConfig(bands=2, pooled=1)
SAMPLING = SamplingConfig(motion=False, prime_latents=2, ring_blocks=2, steps=2, drop_first_frames=0)
FAR = Limits(creations_per_minute=6e4, creations_burst=1000, requests_per_second=1e4, requests_burst=10_000)


@functools.cache
def host() -> SessionHost:
    """Used by one server after the other: compiling is what takes time."""
    dit = tiny_config(audio_dim=MEL.dim, audio_layers=1)
    config = AvatarConfig(
        name="test", image_size=16, dit=dit, vae=tiny_vae_config(), sampling=SAMPLING, log_mel=MEL
    )
    model = Avatar(config, random_dit(dit), random_vae(config.vae))
    return SessionHost(model, 2, PipelineLayout(stages=1, own_decoder=False))


class Live:
    """A server in a thread, and a client for it."""

    def __init__(self, server: Server, thread: threading.Thread) -> None:
        self.server, self.thread = server, thread
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx2.Client(base_url=self.url, timeout=60.0)

    @property
    def sessions(self) -> Any:
        return self.server.config.app.state.services.sessions

    def open(self, **fields: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/sessions", json=fields)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def about(self, session: dict[str, Any]) -> dict[str, Any]:
        return self.client.get(f"/v1/sessions/{session['id']}", headers=bearer(session)).json()

    def end(self, session: dict[str, Any]) -> None:
        assert self.client.delete(f"/v1/sessions/{session['id']}", headers=bearer(session)).status_code == 204

    def stop(self) -> None:
        """As SIGTERM does."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def bearer(session: dict[str, Any], name: str = "token") -> dict[str, str]:
    return {"Authorization": f"Bearer {session[name]}"}


@contextlib.contextmanager
def running(data: Path, **config: Any) -> Iterator[Live]:
    settings = ServerConfig(port=0, data=data, rows=128, tts="off", limits=FAR, **config)
    server = make_server(create_app(host(), settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    live = Live(server, thread)
    try:
        wait_for(lambda: live.client.get("/readyz").status_code == 200, 300)
        yield live
    finally:
        live.stop()
        live.client.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("live")) as found:
        yield found


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """ICE leaves the loopback interface out; a test has no other."""
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


@pytest.fixture(autouse=True)
def _places() -> Iterator[None]:
    """A test that fails leaves no session behind."""
    yield
    for session in host().sessions:
        session.close("the test is over")


class Microphone(MediaStreamTrack):
    """A tone in real time: 48 kHz stereo in frames of 20 ms, as browsers send."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._count, self._start = 0, time.monotonic()

    async def recv(self) -> av.AudioFrame:
        await asyncio.sleep(max(0.0, self._start + self._count * 0.02 - time.monotonic()))
        at = np.arange(self._count * 960, (self._count + 1) * 960)
        tone = (8000 * np.sin(2 * np.pi * 300 * at / 48_000)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone.repeat(2)[None], "s16", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, self._count * 960, Fraction(1, 48_000)
        self._count += 1
        return frame


class Caller:
    """A browser, as far as the server can see."""

    def __init__(self, *, microphone: bool = False, channel: bool = True) -> None:
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.frames: list[tuple[float, av.VideoFrame]] = []
        self.sounds: list[tuple[float, av.AudioFrame]] = []
        self.events: list[dict[str, Any]] = []
        self.channel = self.peer.createDataChannel("events") if channel else None
        if self.channel is not None:
            self.channel.on("message", lambda text: self.events.append(json.loads(text)))
        if microphone:
            self.peer.addTrack(Microphone())
        else:
            self.peer.addTransceiver("audio", "recvonly")
        self.peer.addTransceiver("video", "recvonly")
        self._tasks: list[asyncio.Task[None]] = []
        self.peer.on("track", lambda track: self._tasks.append(asyncio.ensure_future(self._receive(track))))

    async def _receive(self, track: MediaStreamTrack) -> None:
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                (self.frames if track.kind == "video" else self.sounds).append((time.monotonic(), frame))

    async def offer(self) -> str:
        await self.peer.setLocalDescription(await self.peer.createOffer())
        return self.peer.localDescription.sdp

    async def accept(self, sdp: str) -> None:
        await self.peer.setRemoteDescription(RTCSessionDescription(sdp, "answer"))

    async def call(self, live: Live, path: str, headers: dict[str, str]) -> str:
        """Returns where to hang up."""
        headers = headers | {"Content-Type": "application/sdp"}
        answer = await asyncio.to_thread(live.client.post, path, content=await self.offer(), headers=headers)
        assert answer.status_code == 201, answer.text
        await self.accept(answer.text)
        return answer.headers["location"]

    def say(self, **message: Any) -> None:
        assert self.channel is not None
        self.channel.send(json.dumps(message))

    async def until(self, condition: Callable[[], Any], seconds: float = 20.0) -> None:
        for _ in range(int(seconds / 0.02)):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError("it did not happen in time")

    def heard(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    def media_time(self) -> tuple[float, float]:
        """Seconds on the clocks that picture and sound carry, each from its first frame."""

        def since(frames: list[Any]) -> float:
            return float((frames[-1][1].pts - frames[0][1].pts) * frames[0][1].time_base)

        return since(self.frames), since(self.sounds)

    async def close(self) -> None:
        await self.peer.close()
        for task in self._tasks:
            task.cancel()


def go(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))


def test_speak_and_the_avatar_speaks(live: Live) -> None:
    """Microphone up; picture, sound and events down; picture and sound stay together."""
    session = live.open()

    async def scene() -> None:
        caller = Caller(microphone=True)
        offer = await caller.offer()
        assert offer.index("VP8") < offer.index("H264")  # the server must choose what it sends
        await caller.call(live, session["media"]["call"], bearer(session))
        await caller.until(lambda: len(caller.frames) > 75)
        await caller.until(lambda: caller.heard("agent.speech_started"))
        about = await asyncio.to_thread(live.about, session)
        assert (about["state"], about["clients"]) == ("live", 1)
        assert about["stats"]["silence_to_speech_ms"] is None or about["stats"]["silence_to_speech_ms"] > 0
        assert caller.heard("session.state")[0]["session"]["id"] == session["id"]
        _, first = caller.frames[0]
        assert (first.width, first.height) == (128, 128)
        loud = [frame for _, frame in caller.sounds if np.abs(frame.to_ndarray()).max() > 3000]
        assert len(loud) > 10
        # Both carry the session's clock. (How exactly they stay together, tools/measure_live.py measures.)
        before = caller.media_time()
        await asyncio.sleep(2.0)
        seen, heard = (later - earlier for later, earlier in zip(caller.media_time(), before, strict=True))
        assert seen == pytest.approx(heard, abs=0.4)
        assert seen == pytest.approx(2.0, abs=0.6)
        caller.say(type="agent.interrupt", event_id=5)
        await caller.until(lambda: caller.heard("agent.interrupted"))
        caller.say(type="nonsense", event_id=6)
        await caller.until(lambda: [e for e in caller.heard("error") if e["event_id"] == 6])
        await caller.close()
        await caller.until(lambda: not live.sessions.rooms[session["id"]].connections)

    go(scene)
    assert live.about(session)["state"] == "waiting"  # for its client to come back
    live.end(session)


def test_four_viewers_cost_one_encode(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    original = VideoEncoder.encode

    def counting(self: VideoEncoder, frames: np.ndarray) -> Any:
        encoded.append(len(frames))
        return original(self, frames)

    monkeypatch.setattr(VideoEncoder, "encode", counting)
    session = live.open()

    async def scene() -> None:
        callers = [Caller(channel=False) for _ in range(4)]
        places = [
            await caller.call(live, session["media"]["whep"], bearer(session, "viewer_token"))
            for caller in callers
        ]
        start, before = time.monotonic(), sum(encoded)
        for caller in callers:
            await caller.until(lambda caller=caller: len(caller.frames) > 40)
        assert 0 < sum(encoded) - before < 1.5 * 25 * (time.monotonic() - start) + 24
        assert (await asyncio.to_thread(live.about, session))["viewers"] == 4
        for place in places[:2]:
            headers = bearer(session, "viewer_token")
            assert (await asyncio.to_thread(live.client.delete, place, headers=headers)).status_code == 204
        await callers[0].until(lambda: len(live.sessions.rooms[session["id"]].connections) == 2)
        for caller in callers:
            await caller.close()

    go(scene)
    live.end(session)


def test_an_offer_in_json_brings_its_own_session(live: Live) -> None:
    async def scene() -> None:
        caller = Caller(microphone=True)
        fields = {"sdp": await caller.offer(), "type": "offer"}
        answer = await asyncio.to_thread(live.client.post, "/api/offer", json=fields)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        await caller.accept(told["sdp"])
        await caller.until(lambda: len(caller.frames) > 5)
        room = live.sessions.rooms[told["session_id"]]
        await caller.close()
        await caller.until(lambda: room.reason)
        assert room.reason["code"] == "closed"

    go(scene)


GARBAGE = [
    "",
    "v=0",
    "hello\r\n" * 50,
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\n",
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\n",
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\n" + "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n" * 500,
    "\x00\xff" * 100,
    "v=0\r\nm=" + "A" * 90_000,
]


def test_garbage_for_an_offer(live: Live) -> None:
    session = live.open()
    headers = bearer(session) | {"Content-Type": "application/sdp"}

    async def real() -> str:
        caller = Caller(microphone=True)
        offer = await caller.offer()
        await caller.close()
        return offer

    good = asyncio.run(real())
    no_h264 = good.replace("H264/90000", "AV1/90000")
    mangled = [
        good[: len(good) // 2],
        good.replace("ice-ufrag", "ice-x"),
        good.replace("fingerprint", "fp"),
        no_h264,
    ]
    for offer in (*GARBAGE, *mangled):
        answer = live.client.post(session["media"]["call"], content=offer, headers=headers)
        assert answer.status_code in (400, 415), offer[:80]
        assert set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == "unsupported_media"
    wrong_type = live.client.post(session["media"]["call"], content=good, headers=bearer(session))
    assert wrong_type.status_code == 415
    room = live.sessions.rooms[session["id"]]
    assert not room.calls
    assert not room.connections
    assert live.about(session)["state"] == "waiting"
    live.end(session)


def test_one_more_is_told_busy_and_the_others_lose_nothing(live: Live) -> None:
    sessions = [live.open(), live.open()]
    rooms = [live.sessions.rooms[session["id"]] for session in sessions]
    wait_for(lambda: all(room.playout.ticks > 10 for room in rooms))
    for _ in range(20):
        refused = live.client.post("/v1/sessions", json={})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "busy"
        assert int(refused.headers["retry-after"]) > 0
    assert [room.session.stats.dropped_frames for room in rooms] == [0, 0]
    for session in sessions:
        live.end(session)


def test_stopped_under_load_and_started_again(tmp_path: Path, live: Live) -> None:
    """Clients are told, recordings are complete, and the session goes on in the next process."""
    live.stop()  # there is one host, for one server at a time
    settings = {"recordings": tmp_path / "recordings", "state": tmp_path / "state"}
    settings["recordings"].mkdir()

    async def watch(url: str, session: dict[str, Any], told: list[Any]) -> None:
        protocols = ["lavatar.v1", f"token.{session['token']}"]
        where = url.replace("http", "ws") + session["media"]["stream"]
        async with websockets.connect(where, subprotocols=protocols) as socket:
            async for message in socket:
                told.append(message if isinstance(message, bytes) else json.loads(message))

    with running(tmp_path, **settings) as first:
        session = first.open(options={"record": True}, prompt="remember me")
        told: list[Any] = []
        client = threading.Thread(target=lambda: asyncio.run(watch(first.url, session, told)))
        client.start()
        wait_for(lambda: len(told) > 100)
        session_before = host().sessions[0]
        first.stop()
        client.join(20)
        assert [m for m in told if isinstance(m, dict)][-1]["reason"]["code"] == "restart"
        (file,) = settings["recordings"].glob("*.mp4")
        with av.open(str(file)) as container:
            assert sum(1 for _ in container.decode(video=0)) > 24
    assert settings["state"].stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in settings["state"].iterdir()} == {0o600}
    (saved,) = settings["state"].glob("*.json")
    assert session["token"] not in saved.read_text()
    with running(tmp_path, **settings) as second:
        about = second.about(session)  # the old token opens it
        assert (about["state"], about["prompt"]) == ("waiting", "remember me")
        assert host().sessions[0].fed >= session_before.fed
        assert not list(settings["state"].iterdir())  # once
        second.end(session)
