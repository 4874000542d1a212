"""Calls while they are being answered, which takes seconds where addresses are looked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from aiortc import RTCConfiguration, RTCPeerConnection

from lavatar_jax.serving import media_webrtc
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.routes_media import connect
from tests.serving.conftest import Served, serving


async def offer() -> str:
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    for kind in ("audio", "video"):
        peer.addTransceiver(kind, "recvonly")
    await peer.setLocalDescription(await peer.createOffer())
    sdp = peer.localDescription.sdp
    await peer.close()
    return sdp


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`begun`: calls whose addresses are looked for, until `go` is set."""
    found, original = SimpleNamespace(begun=0, go=None), RTCPeerConnection.setLocalDescription

    class Slow(RTCPeerConnection):
        async def setLocalDescription(self, description: object) -> None:  # noqa: N802 - its name there
            found.begun += 1
            await found.go.wait()
            await original(self, description)

    monkeypatch.setattr(media_webrtc, "RTCPeerConnection", Slow)
    return found


async def until_begun(gathering: SimpleNamespace, count: int) -> None:
    async with asyncio.timeout(20):
        while gathering.begun < count:
            await asyncio.sleep(0.01)


def test_calls_count_while_they_are_being_answered(tmp_path: Path, gathering: SimpleNamespace) -> None:
    with serving(tmp_path, limits={"connections": 2}) as served:
        room = served.open().room

        async def six() -> list[object]:
            gathering.go, sdp = asyncio.Event(), await offer()
            calls = [
                asyncio.create_task(connect(served.services, room, sdp, controls=False)) for _ in range(6)
            ]
            await until_begun(gathering, 2)
            gathering.go.set()
            return await asyncio.gather(*calls, return_exceptions=True)

        found = served.call(six)
        refused = [error.code for error in found if isinstance(error, ApiError)]
        assert refused == ["rate_limited"] * 4
        assert len(room.calls) == 2


def test_a_call_that_cannot_be_answered_does_not_count(served: Served, gathering: SimpleNamespace) -> None:
    room = served.open().room

    async def broken() -> None:
        gathering.go = SimpleNamespace(wait=None)  # fails
        with pytest.raises(ApiError) as caught:
            await connect(served.services, room, await offer(), controls=True)
        assert caught.value.status == 400

    served.call(broken)
    assert gathering.begun == 1
    assert not room.calls


def test_a_session_that_ends_meanwhile_is_not_joined(served: Served, gathering: SimpleNamespace) -> None:
    room = served.open().room

    async def ends() -> None:
        gathering.go, sdp = asyncio.Event(), await offer()
        answering = asyncio.create_task(connect(served.services, room, sdp, controls=True))
        await until_begun(gathering, 1)
        await room.stop("closed")
        gathering.go.set()
        with pytest.raises(ApiError) as caught:
            await answering
        assert (caught.value.status, caught.value.code) == (404, "not_found")

    served.call(ends)
    assert not room.calls


def test_a_call_that_is_connected_too_late_is_hung_up(served: Served) -> None:
    """The session has ended between the answer and the connection."""
    room, reasons = served.open().room, []

    async def late() -> bool:
        call = media_webrtc.Call(
            room, SimpleNamespace(stop=lambda: None), controls=True, ice_servers=[], dropped=None
        )  # type: ignore[arg-type]
        original = call.hang_up

        async def hang_up(reason: str) -> None:
            reasons.append(reason)
            await original(reason)

        call.hang_up = hang_up  # type: ignore[method-assign]
        room.reason = {"code": "closed", "message": "The session was closed."}
        call._peer._RTCPeerConnection__connectionState = "connected"
        call._on_state()
        joined = call in room.connections
        await asyncio.sleep(0.1)
        room.reason = None
        return joined

    assert served.call(late) is False
    assert reasons == ["closed"]
