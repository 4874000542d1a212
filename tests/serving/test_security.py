"""Who may do what. Each test fails when its guard is removed."""

import json
import logging
import os

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from starlette.datastructures import Headers
from starlette.websockets import WebSocketDisconnect

from lavatar_jax import cli
from lavatar_jax.errors import UserError
from lavatar_jax.serving import security, server
from lavatar_jax.serving.consent import STATEMENT
from lavatar_jax.serving.sessions import Sessions
from serve import main
from tests.serving.conftest import KEY, Served, picture, serving

OWNERS = [
    ("PATCH", ""), ("DELETE", ""), ("POST", "/speak"), ("POST", "/interrupt"), ("POST", "/recording"),
    ("DELETE", "/recording"), ("GET", "/recording"), ("POST", "/recording/link"), ("POST", "/call"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "below"), [("GET", ""), *OWNERS])
def test_nothing_of_a_session_without_its_token(served: Served, method: str, below: str) -> None:
    session, other = served.open(), served.open()
    unknown = served.client.request(method, f"/v1/sessions/s_{'0' * 16}{below}", headers=session.bearer())
    for headers in (
        {},
        other.bearer(),
        {"Authorization": "Bearer x"},
        {"Authorization": session.told["token"]},
    ):
        answer = served.client.request(method, session.path + below, headers=headers)
        assert answer.status_code == 401
        assert answer.json() == unknown.json()  # whether there is such a session is not told
    assert session.room.reason is None


@pytest.mark.parametrize(("method", "below"), OWNERS)
def test_viewers_only_watch(served: Served, method: str, below: str) -> None:
    session = served.open()
    viewer = session.bearer("viewer_token")
    assert served.client.get(session.path, headers=viewer).status_code == 200
    answer = served.client.request(method, session.path + below, headers=viewer)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "viewer_only")


@pytest.mark.parametrize("alias", ["/whip/", "/whep/"])
def test_aliases_ask_for_the_token(served: Served, alias: str) -> None:
    session = served.open()
    answer = served.client.post(
        alias + session.id, content="v=0", headers={"Content-Type": "application/sdp"}
    )
    assert answer.status_code == 401
    offer = {"sdp": "v=0", "session_id": session.id}
    assert served.client.post("/api/offer", json=offer).status_code == 401


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    token = security.new_token()
    assert security.same(token, security.digest(token))
    assert not security.same("é\ud800", security.digest(token))  # nothing breaks it
    security.check_api_key(Headers({"X-API-Key": KEY}), KEY)
    assert compared == [(32, 32)] * 3


def test_tokens_are_not_kept_and_not_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    session = served.open()
    session.request("GET")
    identity = session.room.identity
    for name in ("token", "viewer_token"):
        assert session.told[name] not in caplog.text
        assert session.told[name] not in str(vars(identity))
    assert session.id in json.dumps([record.__dict__ for record in caplog.records], default=str)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_no_server_for_others_without_a_key(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object) -> None:
        pytest.fail("it would be served")

    monkeypatch.delenv("LAVATAR_API_KEY", raising=False)
    monkeypatch.setattr("lavatar_jax.inference.load_host.load_model_folder", started)  # what comes first
    monkeypatch.setattr(server, "serve", started)
    assert cli.run(lambda: main(["live", "--host", host])) == 2
    assert "API key" in capsys.readouterr().err
    with pytest.raises(UserError, match="16 characters"):
        security.check_exposure(host, "x" * 15)
    security.check_exposure(host, KEY)
    security.check_exposure("127.0.0.1", None)


def test_the_api_key_opens_sessions(tmp_path) -> None:
    with serving(tmp_path, api_key=KEY) as served:
        for path in ("/v1/sessions", "/api/offer"):
            for headers in ({}, {"X-API-Key": "wrong"}):
                answer = served.client.post(
                    path, json={"sdp": "v=0"} if "offer" in path else {}, headers=headers
                )
                assert answer.status_code == 401, path
        assert served.client.get("/metrics").status_code == 401
        assert served.client.get("/v1/config").json()["api_key_required"] is True
        good = {"X-API-Key": KEY}
        assert served.client.get("/metrics", headers=good).status_code == 200
        assert served.client.post("/v1/sessions", json={}, headers=good).status_code == 201


@pytest.mark.parametrize("origin", ["https://evil.example", "http://127.0.0.1:9999", "null", "http://[", ""])
def test_pages_of_other_sites_are_refused(served: Served, origin: str) -> None:
    answer = served.client.post("/v1/sessions", json={}, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_origin")
    assert not served.host.opened
    session = served.open()
    protocols = ["lavatar.v1", f"token.{session.told['token']}"]
    with (
        pytest.raises(WebSocketDisconnect) as refused,
        served.socket(f"{session.path}/stream", protocols, Origin=origin),
    ):
        pass
    assert refused.value.code == 4403


def test_the_own_page_is_not(served: Served) -> None:
    session = served.open()
    protocols = ["lavatar.v1", f"token.{session.told['token']}"]
    with served.socket(f"{session.path}/stream", protocols, Origin="http://127.0.0.1:8765") as socket:
        assert "stream.config" in socket.receive_text()
    answer = served.client.post("/v1/sessions", json={}, headers={"Origin": "http://127.0.0.1:8765"})
    assert answer.status_code == 201


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8765", "[", ""])
def test_names_that_are_not_ours_are_refused(served: Served, host: str) -> None:
    answer = served.client.get("/v1/faces", headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_origin")
    assert served.client.get("/v1/faces", headers={"Host": "localhost:8765"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/docs", "/v1/faces", "/v1/sessions/none", "/nowhere", "/v1/faces/face/image"]
)
def test_headers_that_browsers_obey(served: Served, path: str) -> None:
    headers = served.client.get(path, headers={"Origin": "http://127.0.0.1:8765"}).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "camera=()" in headers["permissions-policy"]
    assert "server" not in headers
    assert not [name for name in headers if name.startswith("access-control-")]  # CORS is closed


def test_a_preflight_is_not_answered(served: Served) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = served.client.options("/v1/sessions", headers=asked)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "path", ["../app.py", "%2e%2e/app.py", "..%2fapp.py", "/etc/passwd", "%2fetc%2fpasswd", "x%00.js", ""]
)
def test_only_files_of_the_page_are_served(served: Served, path: str) -> None:
    answer = served.client.get(f"/page/{path}")
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_errors_tell_nothing_about_the_inside(served: Served, monkeypatch, caplog) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("/secret/path of somebody else's session")

    monkeypatch.setattr(Sessions, "open", fail)
    answer = served.client.post("/v1/sessions", json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert error["message"].split()[-1].rstrip(".") in caplog.text  # the log has it under this id
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_answers_about_sessions_are_not_kept_by_caches(served: Served) -> None:
    session = served.open()
    assert session.request("GET").headers["cache-control"] == "no-store"


def test_an_uploaded_face_needs_consent(served: Served) -> None:
    upload = {"image": ("face.png", picture(), "image/png")}
    for consent in ({}, {"consent": "false"}, {"consent": "yes"}):
        answer = served.client.post("/v1/sessions", files=upload, data=consent)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "consent_required")
    assert not served.host.opened
    assert not (served.data / "consent.jsonl").exists()


def test_consent_is_recorded_without_the_picture(served: Served) -> None:
    upload = {"image": ("face.png", picture(), "image/png")}
    told = []
    for _ in range(2):
        fields = {"consent": "true", "consent_name": "A. Person"}
        answer = served.client.post("/v1/sessions", files=upload, data=fields)
        assert answer.status_code == 201, answer.text
        told.append(answer.json()["id"])
    path = served.data / "consent.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["session"] for line in lines] == told  # appended, nothing is written over
    assert set(lines[0]) == {"time", "image_sha256", "session", "statement", "name"}
    assert lines[0]["statement"] == STATEMENT
    assert len(lines[0]["image_sha256"]) == 64
    assert os.stat(path).st_mode & 0o077 == 0
    everything = [file for file in served.data.rglob("*") if file.is_file()]
    assert everything == [path]  # the picture is nowhere


def test_what_cannot_be_recorded_is_not_done(served: Served) -> None:
    (served.data / "consent.jsonl").mkdir(parents=True)
    upload = {"image": ("face.png", picture(), "image/png")}
    answer = served.client.post("/v1/sessions", files=upload, data={"consent": "true"})
    assert answer.status_code == 503
    assert not served.host.opened
