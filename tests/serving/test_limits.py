"""What is too much, too often or nonsense is refused with a clear error, and the server goes on."""

import io
import json
import struct
import time
import zlib

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.websockets import WebSocketDisconnect

from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.limits import Rate
from lavatar_jax.serving.uploads import decode_picture, decode_sound, pcm16
from tests.serving.conftest import Served, picture, serving, wait_for, wav


def error_of(answer) -> tuple[int, str]:
    assert set(answer.json()) == {"error"}, answer.text
    assert set(answer.json()["error"]) <= {"code", "message", "retry_after"}
    return answer.status_code, answer.json()["error"]["code"]


def healthy(served: Served) -> bool:
    served.open(face="face")
    return served.client.get("/readyz").status_code == 200


def upload(served: Served, data: bytes, **fields: str):
    form = {"consent": "true"} | fields
    return served.client.post("/v1/sessions", files={"image": ("a.png", data)}, data=form)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_pictures_that_unpack_to_too_much(served: Served) -> None:
    start = time.perf_counter()
    assert error_of(upload(served, bomb(60_000, 60_000))) == (413, "too_large")
    assert time.perf_counter() - start < 2
    assert healthy(served)


@pytest.mark.parametrize(
    "data",
    [b"x", b"<svg xmlns='http://www.w3.org/2000/svg'/>", picture("GIF"), picture("BMP"), picture()[:200],
     bomb(400, 400), wav()],
    ids=["text", "svg", "gif", "bmp", "cut", "damaged", "sound"],
)  # fmt: skip
def test_what_is_no_picture(served: Served, data: bytes) -> None:
    """Judged by content: all are called a.png."""
    assert error_of(upload(served, data)) == (415, "unsupported_media")
    assert not served.host.opened


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures(kind: str) -> None:
    assert decode_picture(picture(kind, (80, 48)), 10**6).shape == (48, 80, 3)
    with pytest.raises(ApiError, match="million"):
        decode_picture(picture(kind, (80, 48)), 80 * 48 - 1)


def test_bodies_are_counted_while_they_come(served: Served) -> None:
    """Without a length in the headers, too."""

    def endless():
        yield b"--b\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
        for _ in range(64):
            yield bytes(1 << 20)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = served.client.post("/v1/sessions", content=endless(), headers=headers)
    assert error_of(answer) == (413, "too_large")
    announced = {"Content-Type": "application/json", "Content-Length": str(1 << 30)}
    answer = served.client.post("/v1/sessions", content=b"{", headers=announced)
    assert error_of(answer) == (413, "too_large")
    assert answer.headers["connection"] == "close"  # what was announced is not read
    session = served.open()
    large = json.dumps({"prompt": "x" * 300_000})
    assert error_of(session.request("PATCH", content=large)) == (413, "too_large")
    assert healthy(served)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"face": "nobody"}, "face"),
        ({"face": 5}, "face"),
        ({"face": ["face"]}, "face"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 1001}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"image": "face.png"}, "image"),
        ({"options": "{"}, "options"),
        ({"options": []}, "options"),
        ({"options": {"mode": "shout"}}, "mode"),
        ({"options": {"mode": ["echo"]}}, "mode"),
        ({"options": {"seed": -1}}, "seed"),
        ({"options": {"seed": True}}, "seed"),
        ({"options": {"seed": 1e9}}, "seed"),
        ({"options": {"steps": 4}}, "steps"),
        ({"options": {"voice": "; rm"}}, "voice"),
        ({"consent_name": "x" * 101}, "consent_name"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_fields_that_cannot_be(served: Served, fields: dict, expected: str) -> None:
    answer = served.client.post("/v1/sessions", json=fields)
    assert error_of(answer) == (422, "invalid")
    assert expected in answer.json()["error"]["message"]
    assert not served.host.opened


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":1e999}'])
def test_bodies_that_are_no_json(served: Served, body: bytes) -> None:
    answer = served.client.post("/v1/sessions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    error_of(answer)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 201),  # no part has come: all defaults
        (b"--b", 201),
        (b"--b\r\n\r\n", 400),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", 400),
    ],
)
def test_forms_that_are_none(served: Served, body: bytes, status: int) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = served.client.post("/v1/sessions", content=body, headers=headers)
    assert answer.status_code == status
    no_boundary = {"Content-Type": "multipart/form-data"}
    assert served.client.post("/v1/sessions", content=body, headers=no_boundary).status_code == 400


def test_sound_by_content(served: Served) -> None:
    session = served.open()
    files = {"audio": ("speech.txt", wav(0.5))}
    answer = session.request("POST", "/speak", files=files)
    assert answer.status_code == 202, answer.text
    assert answer.json()["seconds"] == pytest.approx(0.5, abs=0.01)
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    for data in (
        playlist,
        b"RIFF",
        b"ffconcat version 1.0\nfile /etc/passwd",
        wav()[:30],
        picture(),
        b"\xff\xfb",
    ):
        answer = session.request("POST", "/speak", files={"audio": ("a.wav", data)})
        assert error_of(answer) == (415, "unsupported_media")
    assert error_of(session.request("POST", "/speak", json={"audio": "x"})) == (422, "invalid")
    assert error_of(session.request("POST", "/speak", json={"text": "hello"})) == (501, "not_available")


def test_sound_that_is_too_long() -> None:
    with pytest.raises(ApiError, match="longer than 1 s") as refused:
        decode_sound(wav(1.2), 1.0)
    assert refused.value.status == 413
    assert len(decode_sound(wav(0.9, rate=44_100), 1.0)) == pytest.approx(14_400, abs=32)


def test_sound_of_nans() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.full(1600, np.nan, np.float32), 16_000, format="WAV", subtype="FLOAT")
    assert np.array_equal(decode_sound(file.getvalue(), 10.0), np.zeros(1600))
    with pytest.raises(ApiError, match="odd"):
        pcm16(b"abc")


def test_a_burst_of_creations(tmp_path) -> None:
    """Each of a thousand is answered; only as many get in as there is room for, others are not disturbed."""
    limits = {"creations_per_minute": 600, "creations_burst": 50}
    with serving(tmp_path, slots=2, reconnect=600.0, limits=limits) as served:
        first = served.open()
        answers = [served.client.post("/v1/sessions", json={}) for _ in range(1000)]
        kinds = {answer.status_code for answer in answers}
        assert kinds == {201, 429, 503}
        assert sum(answer.status_code == 201 for answer in answers) == 1
        for answer in answers:
            if answer.status_code != 201:
                assert int(answer.headers["retry-after"]) >= 1
                assert error_of(answer)[1] in ("busy", "rate_limited")
        assert first.request("GET").json()["state"] == "waiting"
        assert len(served.host.opened) == 2


def test_busy_until_somebody_leaves(tmp_path) -> None:
    with serving(tmp_path, slots=1) as served:
        session = served.open()
        answer = served.client.post("/v1/sessions", json={})
        assert error_of(answer) == (503, "busy")
        assert answer.headers["retry-after"] == "5"
        assert 'lavatar_refused_total{code="busy"} 1.0' in served.client.get("/metrics").text
        assert session.request("DELETE").status_code == 204
        assert session.request("GET").json()["reason"]["code"] == "closed"
        served.open()


def test_waiting_for_a_place(tmp_path) -> None:
    with serving(tmp_path, slots=1, queue=1, queue_wait=10.0, reconnect=0.5) as served:
        served.open()  # nobody connects to it, so that it makes room
        assert served.client.post("/v1/sessions", json={}).status_code == 201
    with serving(tmp_path, slots=1, queue=1, queue_wait=0.2) as served:
        served.open()
        assert error_of(served.client.post("/v1/sessions", json={})) == (503, "busy")


def test_requests_of_one_address(tmp_path) -> None:
    with serving(tmp_path, limits={"requests_burst": 20, "requests_per_second": 0.1}) as served:
        answers = [served.client.get("/v1/faces") for _ in range(30)]
        assert answers[0].status_code == 200
        assert error_of(answers[-1]) == (429, "rate_limited")
        assert served.client.get("/healthz").status_code == 200
        with pytest.raises(WebSocketDisconnect) as refused, served.socket("/v1/sessions/s/stream", []):
            pass
        assert refused.value.code == 4429


def test_rate_fills_again() -> None:
    now = 0.0
    rate = Rate(2.0, 3, clock=lambda: now)
    for _ in range(3):
        rate.take("a")
    with pytest.raises(ApiError) as refused:
        rate.take("a")
    assert refused.value.retry_after == pytest.approx(0.5)
    rate.take("b")
    now = 0.5
    rate.take("a")
    now = 1e6  # it was away for long: it is owed no more than a burst
    for _ in range(3):
        rate.take("a")
    with pytest.raises(ApiError):
        rate.take("a")
    for name in range(20_000):
        rate.take(str(name))
    assert len(rate._buckets) <= 10_001  # addresses are not remembered for ever


def test_sessions_end_when_nobody_needs_them(tmp_path) -> None:
    with serving(tmp_path, reconnect=0.5, kept=1.0) as served:
        session = served.open()
        wait_for(lambda: session.room.reason)
        assert session.request("GET").json()["reason"]["code"] == "client_gone"
        wait_for(lambda: session.id not in served.services.sessions.rooms)
        assert error_of(session.request("GET")) == (401, "unauthorized")
    with serving(tmp_path, idle=0.5) as served:
        session = served.open()
        wait_for(lambda: session.room.reason)
        assert session.request("GET").json()["reason"]["code"] == "idle"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["face", "prompt", "options", "image", "consent", "text", "voice", "audio", "mode", "sdp", "type"]
)


def test_no_request_breaks_the_server(served: Served) -> None:
    """Anything in any field of any endpoint is an answer below 500."""
    session = served.open()
    served.open()  # no place is left
    operations = [
        (method, path)
        for path, methods in served.client.get("/openapi.json").json()["paths"].items()
        for method in methods
        if (method, path) != ("delete", "/v1/sessions/{id}")
    ]
    assert len(operations) > 20

    @settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        operation=st.sampled_from(operations),
        body=st.dictionaries(KEYS, JSON, max_size=4) | JSON,
        name=st.sampled_from([session.id, "s_1"])
        | st.text(st.characters(categories=["L", "N", "S"]), min_size=1),
        kind=st.sampled_from(
            ["application/json", "application/sdp", "multipart/form-data; boundary=x", "text/x"]
        ),
    )
    def fuzz(operation, body, name, kind) -> None:
        method, path = operation
        for part in ("id", "face", "kind", "ticket", "call"):
            path = path.replace(f"{{{part}}}", name)
        content = json.dumps(body).encode()
        headers = session.bearer() | {"Content-Type": kind}
        answer = served.client.request(method, path, content=content, headers=headers)
        assert answer.status_code < 500 or answer.json()["error"]["code"] in ("busy", "not_available"), path
        if answer.status_code >= 400:
            error_of(answer)

    fuzz()
    assert session.request("GET").json()["state"] == "waiting"
