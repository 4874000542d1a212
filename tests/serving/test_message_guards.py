"""Who may send messages, and what comes of wrong ones, guard by guard."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from lavatar_jax.serving import routes_media, security
from lavatar_jax.serving.config import Limits
from lavatar_jax.serving.media_webrtc import Call
from lavatar_jax.serving.sessions import Opened
from lavatar_jax.serving.verbs import Verbs
from tests.serving.conftest import Served

SDP = {"Content-Type": "application/sdp"}


def verbs(malformed: int = 10) -> Verbs:
    room: Any = SimpleNamespace(check_open=lambda: None, voice=SimpleNamespace())
    return Verbs(room, SimpleNamespace(limits=Limits(malformed=malformed)), controls=True)


def answer_to(text: str | bytes) -> dict[str, Any]:
    return obeyed(verbs(), text)


def obeyed(client: Verbs, text: str | bytes) -> dict[str, Any]:
    """What a client is answered."""
    told: list[str] = ["{}"]
    client.tell = told.append
    asyncio.run(client.obey(text))
    return json.loads(told[-1])


@pytest.mark.parametrize(
    "text",
    ["{", b"\xff\xfe", "[" * 100_000, "[]", "{}", '{"type": 5}', '{"type": "agent.fly"}'],
    ids=["cut", "bytes", "deep", "list", "nothing", "number", "unknown"],
)
def test_every_kind_of_malformed_message_is_told_and_counted(text: str | bytes) -> None:
    client = verbs(malformed=2)
    for _ in range(2):
        assert not client.hopeless
        assert obeyed(client, text)["error"]["code"] == "bad_request"
    assert client.hopeless


def test_garbage_on_a_data_channel_ends_the_call() -> None:
    for hopeless in (False, True):
        reasons: list[str] = []

        async def obey(message: str) -> None: ...

        async def hang_up(reason: str, reasons: list[str] = reasons) -> None:
            reasons.append(reason)

        call: Any = SimpleNamespace(_verbs=SimpleNamespace(obey=obey, hopeless=hopeless), hang_up=hang_up)
        asyncio.run(Call._obey(call, "{"))
        assert reasons == ["malformed"] * hopeless


@pytest.mark.parametrize(
    ("name", "kept"), [("x" * 100, True), ("x" * 101, False), (5, True), (["x"], False), ({}, False)]
)
def test_names_of_messages_come_back_if_they_are_short(name: object, kept: bool) -> None:
    answer = answer_to(json.dumps({"type": "ping", "event_id": name}))
    assert answer.get("event_id", "not there") == (name if kept else "not there")


@pytest.mark.parametrize(("sent", "back"), [(7, 7), (0.5, 0.5), ("x" * 1000, None), ([1], None)])
def test_a_ping_brings_back_a_number(sent: object, back: object) -> None:
    assert answer_to(json.dumps({"type": "ping", "t": sent})) == {"type": "pong", "t": back}


@pytest.mark.parametrize(
    ("path", "controls"), [("/v1/sessions/{}/call", 1), ("/whip/{}", 1), ("/whep/{}", 0)]
)
def test_who_controls_by_which_call(
    served: Served, monkeypatch: pytest.MonkeyPatch, path: str, controls: int
) -> None:
    """Of a viewer's call neither the microphone nor the messages count."""
    made: list[bool] = []

    class Made:
        id = "c"

        def __init__(self, *_: object, controls: bool, **about: object) -> None:
            made.append(controls)

        async def answer(self, sdp: str) -> str:
            return sdp

    monkeypatch.setattr(routes_media, "Call", Made)
    monkeypatch.setattr(routes_media, "Verbs", Made)
    session = served.open()
    answer = served.client.post(path.format(session.id), content="v=0", headers=session.bearer() | SDP)
    assert answer.status_code == 201
    assert made == [bool(controls)] * 2


def test_viewers_offer_nothing_in_json(served: Served) -> None:
    session = served.open()
    offer = {"sdp": "v=0", "session_id": session.id}
    answer = served.client.post("/api/offer", json=offer, headers=session.bearer("viewer_token"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "viewer_only")


def test_nobody_connects_to_a_session_that_has_ended(served: Served) -> None:
    session = served.open()
    assert session.request("DELETE").status_code == 204
    answer = served.client.post(f"{session.path}/call", content="v=0", headers=session.bearer() | SDP)
    assert answer.status_code == 404
    with session.stream() as raw:
        assert json.loads(raw.receive_text())["error"]["code"] == "not_found"


def test_both_tokens_are_compared_whichever_it_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a token is looked at where there is no session: time tells nothing."""
    session, compared = served.open(), []
    hashed, original = [], security.hashlib.sha256
    monkeypatch.setattr(
        security, "hashlib", SimpleNamespace(sha256=lambda data: hashed.append(data) or original(data))
    )
    monkeypatch.setattr(
        security, "hmac", SimpleNamespace(compare_digest=lambda a, b: compared.append(a) or a == b)
    )
    for token, seen in ((session.told["token"], True), (session.told["viewer_token"], True), ("x", False)):
        compared.clear()
        assert session.room.may_watch(token) == seen
        assert len(compared) == 2
    hashed.clear()
    assert served.client.get("/v1/sessions/s_0", headers={"Authorization": "Bearer x"}).status_code == 401
    assert hashed == [b"x"]


def test_tokens_cannot_be_guessed(served: Served) -> None:
    told = [served.open().told for _ in range(2)]
    tokens = {session[name] for session in told for name in ("token", "viewer_token")}
    assert len(tokens) == 4
    assert min(map(len, tokens)) >= 43  # 256 bits


def test_tokens_are_not_shown(served: Served) -> None:
    """Where something that holds them is logged."""
    opened = Opened(room=served.open().room, token="my-token", viewer_token="its-token")
    assert "-token" not in repr(opened)
    assert repr(opened.room.identity.token) not in repr(opened.room.identity)
