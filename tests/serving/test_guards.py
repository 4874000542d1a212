"""Guards that others stand before or behind: each has a test of its own, so that none goes unnoticed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from lavatar_jax.errors import UserError
from lavatar_jax.serving import routes_info, services, uploads
from lavatar_jax.serving.config import Limits, ServerConfig
from lavatar_jax.serving.encoder import Encoder
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.live import Live
from lavatar_jax.serving.media_webrtc import OFFER_BYTES, Call
from lavatar_jax.serving.recording import Recording
from lavatar_jax.serving.security import CONTENT_SECURITY_POLICY, HEADERS, is_loopback
from lavatar_jax.serving.speech import Speech, check_voice
from tests.serving.conftest import Served, picture, serving, wav
from tests.serving.test_parts import tone_moments

SDP = {"Content-Type": "application/sdp"}


@pytest.mark.parametrize("asked", [{}, {"Host": "evil.example"}], ids=["answers", "refusals"])
def test_every_header_on_every_answer(served: Served, asked: dict[str, str]) -> None:
    headers = served.client.get("/v1/faces", headers=asked).headers
    expected = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "microphone=(self), camera=(), geolocation=()",
        "content-security-policy": CONTENT_SECURITY_POLICY,
    }
    assert {name: headers.get(name) for name in expected} == expected
    assert len(expected) == len(HEADERS)


def test_the_policy_names_nobody_else() -> None:
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert {rules[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {
        "'none'"
    }
    words = {word for rule in rules.values() for word in rule.split()}
    assert words == {"'none'", "'self'", "data:", "blob:"}
    assert "blob:" not in rules["script-src"] + rules["connect-src"]


def test_only_known_types_of_files_are_served(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes_info, "PAGE", tmp_path)
    for name in ("notes.js", "notes.py", ".env", "notes.js.bak"):
        (tmp_path / name).write_text("secret")
    found = {path.name: served.client.get(f"/page/{path.name}").status_code for path in tmp_path.iterdir()}
    assert {name for name, status in found.items() if status == 200} <= {"notes.js"}
    assert found["notes.js"] == 200


def test_pictures_that_are_a_little_too_large(tmp_path: Path) -> None:
    """The limit of the body leaves room for the form around a picture."""
    with serving(tmp_path, limits={"image_bytes": 1000}) as served:
        files = {"image": ("a.png", picture())}
        answer = served.client.post("/v1/sessions", files=files, data={"consent": "true"})
        assert 1000 < len(picture()) < 50_000
        assert answer.status_code == 413


def test_sounds_are_opened_by_one_demuxer_that_may_open_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, original = [], uploads.av.open

    def watching(file, mode, **about):
        opened.append((about["format"], about["options"]))
        return original(file, mode, **about)

    monkeypatch.setattr(uploads.av, "open", watching)
    for data in (b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\n", picture()):
        with pytest.raises(ApiError):
            uploads.decode_sound(data, 10.0)
    assert not opened
    assert uploads.decode_sound(wav(), 10.0).any()
    assert opened == [("wav", {"protocol_whitelist": "none"})]


@pytest.mark.parametrize("prompt", ["", " ", "x" * 1001])
def test_prompts_of_running_sessions(served: Served, prompt: str) -> None:
    session = served.open(prompt="smiling")
    assert session.request("PATCH", json={"prompt": prompt}).status_code == 422
    assert session.fake.prompts == ["smiling"]


def test_texts_and_voices() -> None:
    """A text goes to another program, a voice's name into its command line."""
    spoken = []
    tts = SimpleNamespace(
        name="x", voices=("slt",), speak=lambda text, voice: spoken.append(text) or np.zeros(1)
    )
    voice = SimpleNamespace(speak=len, turn=asyncio.Lock(), making=0)
    room = SimpleNamespace(identity=SimpleNamespace(voice=None), check_open=lambda: None, voice=voice)
    speech = Speech(tts, Limits(text_chars=5), level=False)  # type: ignore[arg-type]
    for text in ("123456", "", " ", None):
        with pytest.raises(ApiError, match="text"):
            asyncio.run(speech.say(room, text))  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="voice"):
        asyncio.run(speech.say(room, "12345", "; rm"))  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="voice"):
        check_voice(tts, "-o/etc/passwd")  # type: ignore[arg-type]
    assert not spoken
    asyncio.run(speech.say(room, "12345", "slt"))  # type: ignore[arg-type]
    assert spoken == ["12345"]


def test_viewers_call_without_a_voice(served: Served) -> None:
    session = served.open()
    viewer = session.bearer("viewer_token")
    answer = served.client.post(f"/whip/{session.id}", content="v=0", headers=viewer | SDP)
    assert answer.status_code == 403
    session.room.calls["c"] = SimpleNamespace(controls=True)
    try:
        assert served.client.delete(f"{session.path}/calls/c", headers=viewer).status_code == 403
    finally:
        session.room.calls.clear()
    for controls, expected in ((True, ["heard"]), (False, [])):
        spawned: list[str] = []
        call = SimpleNamespace(controls=controls, _spawn=spawned.append, _listen=lambda track: "heard")
        Call._on_track(call, SimpleNamespace(kind="audio"))  # type: ignore[arg-type]
        assert spawned == expected


def test_calls_that_are_not_connected_yet_count(tmp_path: Path) -> None:
    with serving(tmp_path, limits={"connections": 2}) as served:
        session = served.open()
        session.room.calls |= {"a": object(), "b": object()}
        try:
            answer = session.request("POST", "/call", content="v=0")
            assert answer.status_code == 415  # no SDP: not asked for a place
            answer = served.client.post(f"{session.path}/call", content="v=0", headers=session.bearer() | SDP)
            assert answer.status_code == 429
        finally:
            session.room.calls.clear()


def test_offers_of_any_length(served: Served) -> None:
    session = served.open()
    for size, status in ((OFFER_BYTES - 100, 400), (OFFER_BYTES + 1, 413)):
        answer = served.client.post(
            f"{session.path}/call", content="v=0\r\n" + "a" * size, headers=session.bearer() | SDP
        )
        assert answer.status_code == status


def test_links_grow_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(services, "time", SimpleNamespace(monotonic=lambda: now))
    tickets, room = services.Tickets(), object()
    early, late = tickets.issue(room), tickets.issue(room)  # type: ignore[arg-type]
    now = 159.0
    assert tickets.redeem(early) is room
    now = 161.0
    with pytest.raises(ApiError, match="too old"):
        tickets.redeem(late)


@pytest.mark.parametrize("marked", [True, False])
def test_sessions_are_marked_unless_told_otherwise(tmp_path: Path, marked: bool) -> None:
    config = {} if marked else {"watermark": False}
    with serving(tmp_path, **config) as served:
        painter = served.open().room._broadcast._encoder.video._painter
        assert (painter._watermark is not None) == marked
        assert served.client.get("/v1/config").json()["provenance"]["watermark"] == marked


def test_recordings_end_at_a_number_of_bytes(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "r.mp4", size=(256, 256), fps=25, seconds=1e6, nbytes=5000)
    with pytest.raises(UserError, match="as long as it may be"):
        recording.write(tone_moments(Encoder((256, 256), 25, 600_000), 100))
    assert recording.state == "failed"


def test_nobody_else_is_served_unless_asked() -> None:
    assert is_loopback(Live().host)
    assert is_loopback(ServerConfig().host)
    assert not is_loopback("0.0.0.0")
