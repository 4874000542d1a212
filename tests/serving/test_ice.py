"""STUN and TURN servers: what may be named, and who is told how to use them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from aiortc.rtcicetransport import connection_kwargs, parse_stun_turn_uri

from lavatar_jax.errors import UserError
from lavatar_jax.serving.ice import WORDS
from lavatar_jax.serving.live import Live
from lavatar_jax.serving.media_webrtc import Call
from lavatar_jax.serving.verbs import Verbs
from tests.serving.conftest import serving

URLS = ("stun:stun.example.org", "turn:turn.example.org:3479?transport=udp")
SECRET = {"username": "avatar", "credential": "a secret"}


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, value in zip(WORDS, SECRET.values(), strict=True):
        monkeypatch.setenv(word, value)


@pytest.mark.parametrize(
    "url",
    ["stun:a.example.org", "stun:192.0.2.1:3478", "stuns:b", *URLS, "turns:a:443?transport=tcp"],
)
def test_servers_that_are_taken(credentials: None, url: str) -> None:
    Live(ice_server=(url,))._check()
    parse_stun_turn_uri(url)  # the server's own side takes it as well


@pytest.mark.parametrize(
    "url",
    ["", "stun", "stun:", "stun.example.org", "stun://a.example.org", "http://a", "stun:a:port", "stun:a b",
     "turn:user:secret@a", "turn:a?transport=sctp", "stun:a?transport=udp", "stun:a\n", "stun:a:3478,stun:b",
     "stun:a:0", "stun:a:65536", "stun:[2001:db8::1]"],
)  # fmt: skip
def test_servers_that_are_refused(credentials: None, url: str) -> None:
    with pytest.raises(UserError, match="give stun:HOST"):
        Live(ice_server=(url,))._check()


@pytest.mark.parametrize("missing", WORDS)
def test_turn_without_credentials_is_refused(
    credentials: None, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Browsers throw."""
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match="LAVATAR_TURN_USERNAME and LAVATAR_TURN_CREDENTIAL"):
        Live(ice_server=URLS)._check()


def test_credentials_are_for_who_has_a_token(tmp_path: Path, credentials: None) -> None:
    with serving(tmp_path, ice_servers=URLS) as served:
        session = served.open()
        assert served.client.get("/v1/config").json()["ice_servers"] == [{"urls": URLS[0]}]
        for name in ("token", "viewer_token"):
            told = served.client.get(f"{session.path}/ice", headers=session.bearer(name)).json()
            assert told == {"ice_servers": [{"urls": URLS[0]}, {"urls": URLS[1], **SECRET}]}
        refused = served.client.get(f"{session.path}/ice")
        assert refused.status_code == 401
        for path in ("/v1/config", "/readyz", "/metrics", "/openapi.json", session.path):
            assert SECRET["credential"] not in session.request("GET", "").text + served.client.get(path).text


def test_calls_use_them(tmp_path: Path, credentials: None) -> None:
    from lavatar_jax.serving.ice import ice_servers

    with serving(tmp_path, ice_servers=URLS) as served:
        room = served.open().room

        def call() -> dict:
            verbs = Verbs(room, served.services.speech, controls=True)
            peer = Call(room, verbs, controls=True, ice_servers=ice_servers(URLS), dropped=None)._peer
            return connection_kwargs(peer._RTCPeerConnection__configuration.iceServers)

        used = served.call(call)
    assert used["stun_server"] == ("stun.example.org", 3478)
    assert used["turn_server"] == ("turn.example.org", 3479)
    assert (used["turn_username"], used["turn_password"]) == tuple(SECRET.values())
