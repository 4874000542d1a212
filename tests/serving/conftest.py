"""Servers for tests: the real application on a host without a model, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from PIL import Image
from starlette.testclient import TestClient

from lavatar_jax.serving.app import create_app
from lavatar_jax.serving.config import Limits, ServerConfig
from lavatar_jax.serving.sessions import Sessions
from tests.serving.fake_host import FakeHost

KEY = "a-key-of-at-least-16"


@dataclasses.dataclass
class Served:
    """A running application and what is behind it."""

    client: TestClient
    host: FakeHost
    data: Path

    @property
    def services(self) -> Any:
        return self.client.app.state.services

    def open(self, **fields: Any) -> Session:
        answer = self.client.post("/v1/sessions", json=fields)
        assert answer.status_code == 201, answer.text
        return Session(self, answer.json())

    def socket(self, path: str, protocols: list[str], **headers: str) -> Any:
        """The test client would ask for a host of its own invention."""
        host = {"Host": "127.0.0.1:8765"}
        return self.client.websocket_connect(path, subprotocols=protocols, headers=host | headers)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls a function, or a coroutine function, in the server's event loop."""

        async def run() -> Any:
            result = function(*args)
            return await result if hasattr(result, "__await__") else result

        return self.client.portal.call(run)


@dataclasses.dataclass
class Session:
    """A session as its owner sees it."""

    served: Served
    told: dict[str, Any]

    @property
    def id(self) -> str:
        return self.told["id"]

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.id}"

    @property
    def room(self) -> Any:
        return self.served.services.sessions.rooms[self.id]

    @property
    def fake(self) -> Any:
        return self.room.session

    def bearer(self, name: str = "token") -> dict[str, str]:
        return {"Authorization": f"Bearer {self.told[name]}"}

    def request(self, method: str, below: str = "", **about: Any) -> Any:
        return self.served.client.request(method, self.path + below, headers=self.bearer(), **about)

    def stream(self, name: str = "token") -> Any:
        protocols = ["lavatar.v1", f"token.{self.told[name]}"]
        return self.served.socket(f"{self.path}/stream", protocols)


@contextlib.contextmanager
def serving(
    data: Path, *, slots: int = 2, limits: dict[str, Any] | None = None, **config: Any
) -> Iterator[Served]:
    """`limits` that are not given are far away."""
    generous = {"creations_per_minute": 6e4, "creations_burst": 1000, "requests_per_second": 1e4}
    settings = ServerConfig(
        data=data,
        rows=128,
        tts="off",
        limits=Limits(**generous | {"requests_burst": 10_000} | (limits or {})),
        **config,
    )
    host = FakeHost(slots)
    app = create_app(host, settings)  # type: ignore[arg-type]
    with TestClient(app, base_url="http://127.0.0.1:8765", client=("127.0.0.1", 50_000)) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        yield Served(client, host, data)


@pytest.fixture(autouse=True)
def _no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to compile in a host without a model."""
    original = Sessions._rehearse
    monkeypatch.setattr(
        Sessions, "_rehearse", lambda self: None if isinstance(self.host, FakeHost) else original(self)
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "data") as found:
        yield found


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def wav(seconds: float = 0.5, rate: int = 16_000) -> bytes:
    import soundfile

    file = io.BytesIO()
    time_ = np.arange(int(seconds * rate)) / rate
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * 300 * time_), rate, format="WAV")
    return file.getvalue()
