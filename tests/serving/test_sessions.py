"""A session over HTTP and over its WebSocket: media out, microphone and verbs in, wrong messages, the end."""

import asyncio
import errno
import io
import itertools
import json
import os
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

import av
import soundfile
from starlette.websockets import WebSocketDisconnect

from lavatar_jax.serving.media_ws import AUDIO, HEADER, KEYFRAME, VIDEO
from tests.serving.conftest import Served, Session, picture, serving, wait_for, wav
from tests.serving.fake_host import FakeHost, FakeSession
from tests.serving.sockets import TONE, Socket, speak


def test_what_a_session_tells_about_itself(served: Served) -> None:
    config = served.client.get("/v1/config").json()
    assert config["video"] == {"width": 128, "height": 128, "fps": 25}
    face = served.client.get("/v1/faces").json()["faces"][0]
    for name in ("thumbnail", "image"):
        answer = served.client.get(face[name])
        assert answer.headers["content-type"] == "image/png"
        assert answer.content.startswith(b"\x89PNG")
    session = served.open(face=face["id"], prompt="smiling", options={"mode": "silent"})
    told = session.told
    assert set(told) == {
        "id",
        "token",
        "viewer_token",
        "expires_in",
        "media",
        "recording",
        "speak",
        "session",
    }
    about = session.request("GET").json()
    assert about["state"] == "waiting"
    assert (about["prompt"], about["mode"], about["face"]) == ("smiling", "silent", face["id"])
    assert about["recording"] == {"state": "off", "seconds": 0.0, "bytes": 0, "signed": False}
    changed = session.request("PATCH", json={"prompt": "sad", "mode": "echo"}).json()
    assert (changed["prompt"], changed["mode"]) == ("sad", "echo")
    assert session.fake.prompts == ["smiling", "sad"]
    assert session.request("PATCH", json={"seed": 1}).status_code == 422
    wait_for(lambda: session.request("GET").json()["stats"]["first_frame_ms"])
    assert session.request("DELETE").status_code == 204
    assert session.request("GET").json()["state"] == "closed"
    assert session.request("POST", "/interrupt").status_code == 404


def test_an_uploaded_face(served: Served) -> None:
    files = {"image": ("me.jpg", picture("JPEG"), "image/jpeg")}
    fields = {"consent": "true", "options": '{"seed": 5}', "prompt": "hello"}
    answer = served.client.post("/v1/sessions", files=files, data=fields)
    assert answer.status_code == 201, answer.text
    assert answer.json()["session"]["face"] is None
    assert answer.headers["location"] == f"/v1/sessions/{answer.json()['id']}"


def test_media_over_a_websocket(served: Served) -> None:
    session = served.open(options={"mode": "silent"})
    with session.stream() as raw:
        socket = Socket(raw)
        config = socket.event("stream.config")
        assert config["video"]["width"] == 128
        assert socket.event("session.state")["session"]["id"] == session.id
        socket.watch(2.5)
        videos = [m for m in socket.media if m[0] == VIDEO]
        sounds = [m for m in socket.media if m[0] == AUDIO]
        assert videos[0][1] & KEYFRAME  # a newcomer begins with a picture that needs no other
        decoder = av.CodecContext.create("h264", "r")
        frames = [frame for m in videos for frame in decoder.decode(av.Packet(m[4]))]
        assert len(frames) >= len(videos) - 1
        assert (frames[0].width, frames[0].height) == (128, 128)
        assert [m[2] for m in sounds] == list(range(sounds[0][2], sounds[0][2] + len(sounds)))
        assert {len(m[4]) for m in sounds} == {1280}
        assert np.allclose(np.diff([m[3] for m in sounds]), 0.04)
        assert {m[3] for m in videos} <= {m[3] for m in sounds}  # one clock
        stats = socket.event("stats")
        assert stats["clients"] == 1
        assert 5 < stats["stats"]["fps"] < 40


def test_speech_is_heard_where_it_is_seen(served: Served) -> None:
    session = served.open(options={"mode": "silent"})
    with session.stream() as raw:
        socket = Socket(raw)
        socket.event("session.state")
        socket.say(**speak(event_id="a"))
        socket.say(type="agent.speak_end")
        started = socket.event("agent.speech_started")
        socket.event("agent.speak_done")
        ended = socket.event("agent.speech_ended")
        assert ended["time"] - started["time"] == pytest.approx(1.4, abs=0.6)
        loud = [
            m[3] for m in socket.media if m[0] == AUDIO and np.abs(np.frombuffer(m[4], "<i2")).max() > 3000
        ]
        assert loud[0] == pytest.approx(started["time"], abs=0.1)
        assert len(loud) == pytest.approx(25, abs=3)


def test_the_wait_for_speech_ends_when_its_first_frame_is_sent(served: Served) -> None:
    session = served.open(options={"mode": "silent"})
    sent = []
    watching = SimpleNamespace(show=lambda sending: sent.append((time.monotonic(), sending.moment)))
    served.call(session.room.playout.viewers.append, watching)
    begin = time.monotonic()
    file = io.BytesIO()  # two sentences: that the second one has to wait for the first is not counted
    soundfile.write(file, np.concatenate([TONE, 0 * TONE, TONE]), 16_000, format="WAV")
    session.request("POST", "/speak", files={"audio": ("a", file.getvalue())})
    told = wait_for(lambda: session.request("GET").json()["stats"]["silence_to_speech_ms"])
    first, moment = next((at, moment) for at, moment in sent if moment and moment.loud)
    assert begin < moment.speech < first
    assert told == pytest.approx(1e3 * (first - moment.speech), abs=20)
    wait_for(lambda: len([moment for _, moment in sent if moment and moment.speech]) == 2)
    assert session.request("GET").json()["stats"]["silence_to_speech_ms"] == told
    assert "\nlavatar_silence_to_speech_seconds_count 1.0\n" in served.client.get("/metrics").text


def test_the_microphone_is_echoed_unless_it_should_not(served: Served) -> None:
    session = served.open()
    with session.stream() as raw:
        socket = Socket(raw)
        socket.event("session.state")
        pushed = []
        session.fake.push_audio = lambda samples: pushed.append(samples)

        def send() -> int:
            before = sum(map(len, pushed))
            for at in range(0, 3200, 640):
                raw.send_bytes(TONE[at : at + 640].tobytes())
            socket.say(type="ping", t=7)
            assert socket.event("pong")["t"] == 7
            return sum(map(len, pushed)) - before

        assert send() == 3200
        socket.say(type="microphone", muted=True)
        assert send() == 0
        socket.say(type="microphone", muted=False, sample_rate=48_000)
        assert 0 < send() < 1200
        session.request("PATCH", json={"mode": "silent"})
        assert send() == 0


def test_interrupt_drops_what_waits(served: Served) -> None:
    session = served.open(options={"mode": "silent"})
    with session.stream() as raw:
        socket = Socket(raw)
        socket.event("session.state")
        assert session.request("POST", "/speak", files={"audio": ("a", wav(30))}).status_code == 202
        wait_for(lambda: session.fake.queued_seconds > 10)
        socket.event("agent.speech_started")
        socket.say(type="agent.interrupt")
        socket.event("agent.interrupted")
        assert session.fake.interrupts == 1
        assert session.room.voice.queued == 0.0
        socket.event("agent.speech_ended")


def test_pieces_of_speech_are_bounded(tmp_path) -> None:
    with serving(tmp_path, limits={"sound_seconds": 5.0}) as served:
        session = served.open()
        with session.stream() as raw:
            socket = Socket(raw)
            for number in range(8):
                socket.say(**speak(event_id=number))
            refused = socket.event("error")
            assert refused["error"]["code"] == "too_large"
            assert refused["event_id"] > 3


WRONG = [
    ("{", "bad_request"),
    ("[]", "bad_request"),
    ('{"type": 5}', "bad_request"),
    ('{"type": "agent.fly"}', "bad_request"),
    ('{"type": "agent.speak"}', "invalid"),
    ('{"type": "agent.speak", "audio": "%%"}', "invalid"),
    ('{"type": "agent.speak", "audio": "AAA="}', None),
    ('{"type": "agent.speak", "audio": "AA=="}', "bad_request"),
    ('{"type": "agent.speak", "audio": "AAA=", "format": "mp9"}', "invalid"),
    ('{"type": "agent.speak", "audio": "AAA=", "format": "file"}', "unsupported_media"),
    ('{"type": "agent.speak", "audio": "AAA=", "sample_rate": true}', "invalid"),
    ('{"type": "agent.speak", "audio": "AAA=", "sample_rate": 1}', "invalid"),
    ('{"type": "agent.set_prompt"}', "invalid"),
    ('{"type": "agent.set_prompt", "prompt": ["x"]}', "invalid"),
    ('{"type": "agent.say", "text": "x"}', "not_available"),
    ('{"type": "microphone", "sample_rate": "x"}', "invalid"),
    ('{"type": "recording.stop"}', "not_found"),
]


def test_wrong_messages_are_answered(tmp_path) -> None:
    with serving(tmp_path, limits={"malformed": 100}) as served:
        session = served.open()
        with session.stream() as raw:
            socket = Socket(raw)
            for text, code in WRONG:
                raw.send_text(text)
                if code:
                    assert socket.event("error")["error"]["code"] == code, text
            nans = np.full(1000, np.nan, "<f4").tobytes()
            for data in (b"", b"x", nans, bytes(70_000)):
                raw.send_bytes(data)
            assert socket.event("error")["error"]["code"] == "bad_request"  # half a sample
            socket.say(type="ping", t=1)
            socket.event("pong")
        assert session.room.reason is None


def test_who_sends_only_garbage_is_shown_the_door(served: Served) -> None:
    session, other = served.open(), served.open()
    with session.stream() as raw, other.stream() as undisturbed:
        socket = Socket(raw)
        for _ in range(20):
            raw.send_bytes(b"\xff\xfe\xfd")
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.event("session.closed")
        assert closed.value.code == 4400
        watching = Socket(undisturbed)
        watching.watch(1.0)
    assert other.room.reason is None
    assert session.room.reason is None  # it can be connected to again


@pytest.mark.parametrize(("token", "code"), [("", 4401), ("wrong", 4401)])
def test_sockets_need_the_token(served: Served, token: str, code: int) -> None:
    session = served.open()
    protocols = ["lavatar.v1", f"token.{token}"]
    with served.socket(f"{session.path}/stream", protocols) as raw:
        socket = Socket(raw)
        assert socket.event("error")["error"]["code"] == "unauthorized"
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive()
        assert closed.value.code == code
    assert not session.room.connections


def test_viewers_see_and_are_not_heard(served: Served) -> None:
    session = served.open()
    with session.stream("viewer_token") as raw:
        socket = Socket(raw)
        socket.say(type="agent.interrupt")
        assert socket.event("error")["error"]["code"] == "viewer_only"
        raw.send_bytes(TONE.tobytes())
        assert socket.event("error")["error"]["code"] == "viewer_only"
        socket.watch(0.5)
        about = session.request("GET").json()
        assert (about["clients"], about["viewers"]) == (0, 1)
    assert session.fake.interrupts == 0


def test_connections_of_one_session(tmp_path) -> None:
    with serving(tmp_path, limits={"connections": 1}) as served:
        session = served.open()
        with session.stream() as raw:
            Socket(raw).event("session.state")
            with session.stream() as second:
                socket = Socket(second)
                assert socket.event("error")["error"]["code"] == "rate_limited"


def test_a_client_that_does_not_read_disturbs_nobody(served: Served) -> None:
    """What it misses is left out, and it goes on with a keyframe."""
    session = served.open()
    with session.stream() as raw, session.stream("viewer_token") as undisturbed:
        socket, other = Socket(raw), Socket(undisturbed)
        socket.watch(0.5)
        connection = session.room.connections[0]
        real, connection._socket.send_bytes = connection._socket.send_bytes, _never
        time.sleep(3.0)
        connection._socket.send_bytes = real
        assert connection._out.qsize() <= 60
        assert served.services.metrics.dropped_frames._value.get() >= 1
        socket.watch(4.0)
        videos = [m for m in socket.media if m[0] == VIDEO]
        after_gaps = [m for last, m in itertools.pairwise(videos) if m[2] > last[2] + 1]
        assert after_gaps
        assert all(m[1] & KEYFRAME for m in after_gaps)
        other.watch(0.5)
        numbers = [m[2] for m in other.media if m[0] == VIDEO]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def _never(data: bytes) -> None:

    await asyncio.sleep(3.0)


def test_a_session_survives_its_clients_reconnect(tmp_path) -> None:
    with serving(tmp_path, reconnect=1.5) as served:
        session = served.open()
        for _ in range(3):
            with session.stream() as raw:
                Socket(raw).watch(0.3)
            time.sleep(0.7)
            assert session.request("GET").json()["state"] == "waiting"
        wait_for(lambda: session.room.reason)
        assert session.room.reason["code"] == "client_gone"


def test_clients_are_told_when_the_server_stops(served: Served) -> None:
    session = served.open(options={"record": True})
    with session.stream() as raw:
        socket = Socket(raw)
        socket.watch(1.5)
        file = session.room.recording
        served.client.portal.start_task_soon(served.services.sessions.stop)
        assert socket.event("session.closed")["reason"]["code"] == "shutdown"
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.event("never")
        assert closed.value.code == 1001
    assert file.state == "off"
    wait_for(lambda: served.host.closed)
    answer = served.client.post("/v1/sessions", json={})
    assert answer.json()["error"]["code"] == "stopping"
    assert served.client.get("/readyz").status_code == 503
    assert served.client.get("/healthz").status_code == 200


def test_who_can_go_on_later_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = FakeHost.save

    def fail_for_other(host: FakeHost, session: FakeSession, path: Path) -> None:
        if session.prompts == ["other"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(host, session, path)

    monkeypatch.setattr(FakeHost, "save", fail_for_other)
    told = {}
    with serving(tmp_path, state=tmp_path / "state") as served:
        session, other = served.open(prompt="one"), served.open(prompt="other")
        with session.stream() as raw, other.stream() as other_raw:
            sockets = {"one": Socket(raw), "other": Socket(other_raw)}
            for socket in sockets.values():
                socket.event("session.state")
            served.client.portal.start_task_soon(served.services.sessions.stop)
            for name, socket in sockets.items():
                reason = socket.event("session.closed")["reason"]["code"]
                with pytest.raises(WebSocketDisconnect) as closed:
                    socket.event("never")
                told[name] = (reason, closed.value.code)
    assert told == {"one": ("restart", 1001), "other": ("shutdown", 1001)}
    with serving(tmp_path, state=tmp_path / "state") as served:
        where = session.path
        assert served.client.get(where, headers=session.bearer()).json()["state"] == "waiting"
        assert served.client.get(other.path, headers=other.bearer()).status_code == 401


@pytest.mark.parametrize("saves", [True, False])
def test_a_session_may_come_back_until_all_are_restored(tmp_path: Path, saves: bool) -> None:
    """Whether there is one is told to nobody before it is there."""
    with serving(tmp_path, state=tmp_path / "state" if saves else None) as served:
        session, sessions = served.open(), served.services.sessions
        room = sessions.rooms.pop(session.id)
        for ready, error, code in ((False, "starting", 4503), (True, "unauthorized", 4401)):
            sessions.ready = ready
            if not saves:
                error, code = "unauthorized", 4401
            assert session.request("GET").json()["error"]["code"] == error
            with session.stream() as raw:
                socket = Socket(raw)
                assert socket.event("error")["error"]["code"] == error
                with pytest.raises(WebSocketDisconnect) as closed:
                    socket.receive()
                assert closed.value.code == code
        sessions.rooms[session.id] = room


def test_a_session_that_fails_is_told_and_others_go_on(served: Served) -> None:
    session, other = served.open(), served.open()
    with session.stream() as raw:
        socket = Socket(raw)
        socket.watch(0.3)
        session.fake.read = None
        assert socket.event("session.closed")["reason"]["code"] == "failed"
    assert other.request("GET").json()["state"] == "waiting"


def test_metrics(served: Served) -> None:
    session = served.open()
    with session.stream() as raw:
        Socket(raw).watch(1.5)
        text = served.client.get("/metrics").text
    names = (
        "block_seconds_count real_time_factor ttff_seconds_count silence_to_speech_seconds_count queue_depth"
    )
    for name in f"{names} underruns_total sessions viewers dropped_frames_total recompiles_total".split():
        assert f"\nlavatar_{name} " in text
    value = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(value["lavatar_block_seconds_count"]) >= 1
    assert float(value["lavatar_ttff_seconds_count"]) == 1
    assert float(value["lavatar_viewers"]) == 1
    assert float(value["lavatar_frames_total"]) > 20


def test_the_header_is_sixteen_bytes() -> None:
    assert HEADER.size == 16
    assert HEADER.pack(1, 1, 0, 5, 40_000.0) == b"\1\1\0\0\5\0\0\0" + struct.pack("<d", 40_000.0)


def test_sessions_do_not_see_each_other(served: Served) -> None:
    one, other = served.open(prompt="my secret"), served.open()
    assert "secret" not in json.dumps(other.request("GET").json())
    assert served.client.get(f"/v1/sessions/{one.id}", headers=Session.bearer(other)).status_code == 401


def test_a_model_that_failed_is_told(served: Served) -> None:
    served.host.running = False
    for path in ("/healthz", "/readyz"):
        answer = served.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_available")
    assert served.client.post("/v1/sessions", json={}).json()["error"]["code"] == "not_available"


def test_nothing_is_left_of_sessions_that_have_gone(tmp_path) -> None:
    with serving(tmp_path, kept=0.0) as served:
        served.open().request("DELETE")
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(15):
            session = served.open(options={"record": True})
            with session.stream() as raw:
                Socket(raw).watch(0.2)
            assert session.request("DELETE").status_code == 204
        wait_for(lambda: not served.services.sessions.rooms)
        after = threading.active_count(), len(os.listdir("/proc/self/fd"))
        assert after[0] <= before[0] + 2
        assert after[1] <= before[1] + 6
        assert not list(served.services.sessions.recordings.iterdir())
