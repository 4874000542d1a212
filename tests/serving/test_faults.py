"""Clients that die, freeze or flood: a real server on loopback, and clients in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

import aioice.ice
import httpx2
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lavatar_jax.serving import media_webrtc
from lavatar_jax.serving.app import create_app
from lavatar_jax.serving.config import Limits, ServerConfig
from lavatar_jax.serving.server import make_server
from tests.serving.conftest import wait_for
from tests.serving.fake_host import FakeHost

FAR = {
    "creations_per_minute": 6e4,
    "creations_burst": 1000,
    "requests_per_second": 1e4,
    "requests_burst": 10_000,
}
CLIENT = Path(__file__).parent / "lone_client.py"


@dataclasses.dataclass
class Real:
    """A server on a port, in a thread."""

    app: Any
    port: int

    @property
    def sessions(self) -> Any:
        return self.app.state.services.sessions

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def open(self) -> dict[str, Any]:
        answer = httpx2.post(self.url("/v1/sessions"), json={})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def state(self, session: dict[str, Any]) -> str:
        headers = {"Authorization": f"Bearer {session['token']}"}
        return httpx2.get(self.url(f"/v1/sessions/{session['id']}"), headers=headers).json()["state"]

    def send(self, start: str, chunk: bytes, most: int, first: bytes = b"") -> tuple[bytes, int]:
        """Sends a request until it is answered: the answer, and how many bytes the server took before."""
        taken = 0
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
            line.sendall(f"{start}\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode() + first)
            with contextlib.suppress(ConnectionError):
                while taken < most and not _readable(line):
                    line.sendall(chunk)
                    taken += len(chunk)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while data := line.recv(65536):
                    answer += data
        return answer, taken


def _readable(line: socket.socket) -> bool:
    line.setblocking(False)
    try:
        return bool(line.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        line.settimeout(20)


@contextlib.contextmanager
def real(data: Path, *, limits: dict[str, Any] | None = None, **config: Any) -> Iterator[Real]:
    far = Limits(**FAR | (limits or {}))
    settings = ServerConfig(port=0, data=data, rows=128, tts="off", limits=far, **config)
    app = create_app(FakeHost(3), settings)  # type: ignore[arg-type]
    server = make_server(app, settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        found = Real(app, server.servers[0].sockets[0].getsockname()[1])
        wait_for(lambda: httpx2.get(found.url("/readyz")).status_code == 200)
        yield found
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Client:
    """A process that will watch a session."""

    def __init__(self) -> None:
        root = str(CLIENT.parents[2])
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENT)], text=True, cwd=root, env=os.environ | {"PYTHONPATH": root},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.told: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def connect(self, server: Real, session: dict[str, Any], way: str, token: str = "token") -> None:
        assert self.process.stdin is not None
        where = server.url(f"/v1/sessions/{session['id']}")
        self.process.stdin.write(f"{way} {where} {session[token]}\n")
        self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.told.extend(map(json.loads, self.process.stdout))

    @property
    def frames(self) -> int:
        return self.told[-1]["frames"] if self.told else 0

    @property
    def late(self) -> dict[str, float]:
        return self.told[-1]["late"]

    def watch(self, frames: int) -> None:
        """Waits for so many more."""
        until = self.frames + frames
        wait_for(lambda: self.frames >= until, 40)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        self.process.wait(10)
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()  # type: ignore[union-attr]


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    """Three, ready to connect: until they have started, no session has to wait for them."""
    found = [Client() for _ in range(3)]
    for client in found:
        wait_for(lambda client=client: client.told, 120)
    yield found
    for client in found:
        client.end()


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


def test_a_client_that_is_killed(
    tmp_path: Path, clients: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says no goodbye, and is noticed all the same, long before ICE would. The others lose no frame."""
    monkeypatch.setattr(media_webrtc, "SILENCE", 4.0)
    with real(tmp_path, reconnect=5.0) as server:
        session, other = server.open(), server.open()
        killed, watching, _ = clients
        killed.connect(server, session, "webrtc")
        watching.connect(server, other, "websocket")
        killed.watch(10)
        watching.watch(10)
        killed.end(signal.SIGKILL)
        wait_for(lambda: server.state(session) == "waiting", 10)
        wait_for(lambda: server.state(session) == "closed", 10)
        assert server.sessions.rooms[session["id"]].reason["code"] == "client_gone"
        watching.watch(25)
        assert watching.told[-1]["gaps"] == 0
        assert server.state(other) == "live"
        assert httpx2.get(server.url("/healthz")).status_code == 200


def test_clients_that_freeze_for_ten_seconds(tmp_path: Path, clients: list[Client]) -> None:
    """They go on where the others are: on the same connections, nothing piled up, no later than before."""
    with real(tmp_path) as server:
        session = server.open()
        calling, socketed, awake = clients
        calling.connect(server, session, "webrtc")
        socketed.connect(server, session, "websocket", "viewer_token")
        awake.connect(server, server.open(), "websocket")
        for client in clients:
            client.watch(50)
        room = server.sessions.rooms[session["id"]]
        before, connections = [dict(client.late) for client in clients], list(room.connections)
        assert len(connections) == 2
        for client in clients[:2]:
            client.process.send_signal(signal.SIGSTOP)
        most, until = 0, time.monotonic() + 10.0
        while time.monotonic() < until:
            most = max([most, *map(waiting, connections)])
            time.sleep(0.1)
        for client in clients[:2]:
            client.process.send_signal(signal.SIGCONT)
        assert most <= media_webrtc.BEHIND
        for client in clients:
            client.watch(75)  # among them a keyframe
        wait_for(lambda: all(not waiting(connection) for connection in connections))
        assert room.connections == connections
        for client, early in zip(clients, before, strict=True):
            for kind, late in client.late.items():
                assert late - early[kind] == pytest.approx(0.0, abs=0.6), kind
        assert awake.told[-1]["gaps"] == 0


def waiting(connection: Any) -> int:
    """What waits to be sent to a client."""
    if isinstance(connection, media_webrtc.Call):
        return max(track._packets.qsize() for track in (connection._video, connection._sound))
    return connection._out.qsize()


def test_a_gigabyte_is_not_taken(tmp_path: Path) -> None:
    """Uploaded in chunks of no announced length: answered, and no longer read, soon after the limit."""
    with real(tmp_path) as server:
        chunk = b"%x\r\n%s\r\n" % (1 << 16, bytes(1 << 16))
        part = b"--b\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
        forms = (
            ("multipart/form-data; boundary=b", part, b"413"),
            ("multipart/form-data; boundary=b", b"", b"400"),
        )
        for kind, first, status in (*forms, ("application/json", b"", b"413")):
            start = f"POST /v1/sessions HTTP/1.1\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked"
            answer, taken = server.send(
                start, chunk, 1 << 30, b"%x\r\n%s\r\n" % (len(part), first) if first else b""
            )
            assert answer.startswith(b"HTTP/1.1 " + status), answer
            assert b"connection: close" in answer.lower()
            assert taken < Limits().image_bytes + (8 << 20)  # some is on its way
        assert httpx2.get(server.url("/healthz")).status_code == 200


def test_a_body_that_does_not_come(tmp_path: Path) -> None:
    with real(tmp_path, limits={"body_seconds": 0.5}) as server:
        start = "POST /v1/sessions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 1000"
        begun = time.monotonic()
        answer, _ = server.send(start, b"{", 1)
        assert answer.startswith(b"HTTP/1.1 408"), answer
        assert b"connection: close" in answer.lower()
        assert time.monotonic() - begun < 5


def test_what_the_web_server_guards(tmp_path: Path) -> None:
    """Not the application: it never sees these."""
    with real(tmp_path, limits={"requests_burst": 30, "requests_per_second": 0.1}) as server:
        session = server.open()
        where = server.url(f"/v1/sessions/{session['id']}/stream").replace("http", "ws", 1)
        with connect(where, subprotocols=["lavatar.v1", f"token.{session['token']}"]) as stream:
            stream.send("x" * (Limits().message_bytes + 1))
            with pytest.raises(ConnectionClosed) as closed:
                _ = [stream.recv(timeout=10) for _ in range(1000)]
            assert closed.value.rcvd.code == 1009
        answers = [
            httpx2.get(server.url("/v1/faces"), headers={"X-Forwarded-For": f"10.0.0.{n}"}) for n in range(40)
        ]
        assert "server" not in answers[0].headers
        assert answers[-1].status_code == 429  # an address that a client states is no address
