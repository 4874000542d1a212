"""Recordings of sessions: whole, while they grow, and where the disk is full."""

import asyncio
import errno
import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

import av

from lavatar_jax.serving import recording, room
from lavatar_jax.serving.routes_sessions import recorded
from tests.serving.conftest import Served, serving, wait_for
from tests.serving.sockets import Socket


def test_recording(served: Served) -> None:
    session = served.open()
    assert session.request("GET", "/recording").status_code == 404
    assert session.request("DELETE", "/recording").status_code == 404
    assert session.request("POST", "/recording").status_code == 201
    assert session.request("POST", "/recording").status_code == 409
    wait_for(lambda: session.request("GET", "/recording").status_code == 200)
    early = session.request("GET", "/recording")
    assert early.headers["content-type"] == "video/mp4"
    assert frames_of(early.content) >= 1  # while it goes on
    link = session.request("POST", "/recording/link").json()
    stopped = session.request("DELETE", "/recording").json()
    assert stopped["state"] == "off"
    whole = served.client.get(link["url"])  # without any header
    assert "attachment" in whole.headers["content-disposition"]
    assert frames_of(whole.content) == pytest.approx(25 * stopped["seconds"], abs=1)
    assert served.client.get(link["url"]).status_code == 404  # once
    path = session.room.recording.path
    assert session.request("DELETE").status_code == 204
    assert session.request("GET", "/recording").status_code == 200
    served.call(session.room.forget)
    assert not path.exists()


@pytest.mark.parametrize("change", ["grows", "is replaced", "begins again"])
def test_a_recording_that_changes_while_it_is_sent(served: Served, change: str) -> None:
    """As many bytes are sent as were announced."""
    session = served.open(options={"record": True})
    wait_for(lambda: session.request("GET", "/recording").status_code == 200)
    session.request("DELETE", "/recording")
    path, sent = session.room.recording.path, []
    before = path.read_bytes()

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        await asyncio.Event().wait()
        return {}

    async def download() -> None:
        answer = await recorded(session.room)
        if change == "grows":
            path.write_bytes(before + b"more")
        elif change == "is replaced":
            (path.parent / "signed").write_bytes(b"signed")
            os.replace(path.parent / "signed", path)
        else:
            session.room.record()
        await answer({"type": "http", "method": "GET", "headers": []}, receive, send)

    served.call(download)
    start, *pieces = sent
    assert dict(start["headers"])[b"content-length"] == b"%d" % len(before)
    assert b"".join(piece["body"] for piece in pieces) == before


def test_the_recording_is_complete_when_the_end_is_told(served: Served) -> None:
    """Its client asks for it at once."""
    session = served.open(options={"record": True})
    with session.stream() as raw:
        socket = Socket(raw)
        wait_for(lambda: session.room.recording.bytes)
        session.room._sign = lambda path: time.sleep(0.5)
        socket.say(type="session.close")
        socket.event("session.closed")
        assert session.room.recording.signed


def test_a_recording_that_is_being_signed_is_waited_for(served: Served) -> None:
    session = served.open(options={"record": True})
    wait_for(lambda: session.room.recording.bytes)
    signing, go = threading.Event(), threading.Event()

    def sign(path: Path) -> None:
        signing.set()
        assert go.wait(20)
        path.write_bytes(b"signed")

    session.room._sign = sign
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(session.request, "DELETE", "/recording")
        assert signing.wait(20)
        wanted = pool.submit(session.request, "GET", "/recording")
        with pytest.raises(TimeoutError):
            wanted.result(timeout=0.5)
        go.set()
        assert wanted.result().content == b"signed"
        assert stopped.result().json()["signed"] is True


def test_a_recording_that_begins_while_the_last_one_is_signed_is_kept(served: Served) -> None:
    session = served.open(options={"record": True})
    wait_for(lambda: session.room.recording.bytes)
    signing, go = threading.Event(), threading.Event()

    def sign(path: Path) -> None:
        signing.set()
        assert go.wait(20)
        part = path.with_suffix(".part")
        part.write_bytes(b"signed")
        os.replace(part, path)

    session.room._sign = sign
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(session.request, "DELETE", "/recording")
        assert signing.wait(20)
        assert session.request("POST", "/recording").status_code == 201
        wait_for(lambda: session.room.recording.bytes)
        go.set()
        assert stopped.result().status_code == 200
    session.room._sign = None
    first = session.room.recording.frames
    wait_for(lambda: session.room.recording.frames > first)
    assert session.request("DELETE", "/recording").json()["state"] == "off"
    assert frames_of(session.request("GET", "/recording").content) > first
    assert list(session.room._folder.iterdir()) == [session.room.recording.path]  # nothing of the other


def test_a_recording_that_is_still_being_completed_is_waited_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "COMPLETING", 0.1)
    session = served.open(options={"record": True})
    with session.stream() as raw:
        socket = Socket(raw)
        wait_for(lambda: session.room.recording.bytes)
        session.room._sign = lambda path: (time.sleep(1.0), path.write_bytes(b"signed"))
        socket.say(type="session.close")
        socket.event("session.closed")
        assert not session.room.recording.signed  # nobody waits for ever to hear of the end
        assert session.request("GET", "/recording").content == b"signed"


def frames_of(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as file:
        return sum(1 for _ in file.decode(video=0))


@pytest.mark.parametrize("limit", [{"recording_seconds": 0.5}, {"recording_bytes": 2000}])
def test_a_recording_that_is_as_long_as_it_may_be_is_signed_before_it_is_told(
    tmp_path: Path, limit: dict[str, float]
) -> None:
    """Its client asks for it at once."""
    with serving(tmp_path, limits=limit) as served:
        session = served.open()
        session.room._sign = lambda path: (time.sleep(0.5), path.write_bytes(b"signed"))
        with session.stream() as raw:
            socket = Socket(raw)
            assert session.request("POST", "/recording").status_code == 201
            assert "as long as it may be" in socket.event("recording.failed")["error"]["message"]
            assert session.room.recording.signed
            assert session.request("GET", "/recording").content == b"signed"


def test_a_full_disk_ends_the_recording_and_nothing_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(recording._Appended):
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recording, "_Appended", Full)
    session = served.open(options={"record": True})
    with session.stream() as raw:
        socket = Socket(raw)
        failed = socket.event("recording.failed")["error"]
        assert "disk is full" in failed["message"]
        assert "/" not in failed["message"]
        socket.watch(0.5)
    assert session.request("GET").json()["recording"]["state"] == "failed"
