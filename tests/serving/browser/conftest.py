"""One browser for all tests of the page; a server with the small model, and servers without one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aioice.ice
import httpx2
import numpy as np
import pytest
import soundfile

from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.serving.app import create_app
from lavatar_jax.serving.config import Limits, ServerConfig
from lavatar_jax.serving.server import Server, make_server
from tests.serving.browser.chromium import PROGRAM, Browser, Page, chromium
from tests.serving.browser.puppet import PuppetHost
from tests.serving.conftest import wait_for

ROOT = Path(__file__).parents[3]
SPOKEN, SILENT = 2.4, 2.6  # seconds of the microphone, again and again
# A test that fails leaves no session behind, which would keep the only place.
LEAVE = """
(async () => {
  const kept = JSON.parse(sessionStorage.getItem("session"));
  const headers = { Authorization: `Bearer ${kept.token}` };
  await fetch(`/v1/sessions/${kept.id}`, { method: "DELETE", headers });
})().catch(() => null)
"""
FAR = Limits(creations_per_minute=6e4, creations_burst=1000, requests_per_second=1e4, requests_burst=10_000)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        missing = "chromium is not installed (Debian: apt-get install --no-install-recommends chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    samples, rate = soundfile.read(SAMPLES / "voice.flac", dtype="float32")
    words = samples[: int(SPOKEN * rate)].repeat(48_000 // rate)  # what Chromium wants
    wave = tmp_path_factory.mktemp("microphone") / "voice.wav"
    soundfile.write(wave, np.concatenate([words, np.zeros(int(SILENT * 48_000))]), 48_000, subtype="PCM_16")
    with chromium(wave) as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab that may only ever speak to its own server."""
    with browser.page() as found:
        yield found
        found.evaluate(LEAVE)
        own = found.evaluate("window.location.host")
        asked = [url for url in found.requests if not url.startswith(("blob:", "data:", "about:"))]
        assert not [url for url in asked if url.split("/")[2] != own], "third parties were asked"
        assert not found.complaints


@pytest.fixture(scope="session")
def live(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `serve.py live` with the small model and one place; the first user's way to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = tmp_path_factory.mktemp("data")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    options = {"--port": str(port), "--sessions": "1", "--data": str(data)}
    command = [sys.executable, "serve.py", "live", *itertools.chain(*options.items())]
    with open(data / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: server.poll() is not None or _answers(f"{address}/readyz"), 240)
        assert server.poll() is None, (data / "log").read_text()[-2000:]
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


class Puppets:
    """A real server of puppets, in a thread of this process."""

    def __init__(self, host: PuppetHost, settings: ServerConfig, *, ready: bool = True) -> None:
        self.host, self.data = host, settings.data
        self.server: Server = make_server(create_app(host, settings), settings)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        wait_for(lambda: self.server.started and self.sessions.ready >= ready)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx2.Client(base_url=self.url, timeout=20.0)

    @property
    def services(self) -> Any:
        return self.server.config.app.state.services  # type: ignore[union-attr]

    @property
    def sessions(self) -> Any:
        return self.services.sessions

    @property
    def room(self) -> Any:
        """The only one that is open."""
        (room,) = self.sessions.open_rooms
        return room

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        """In the server's own thread."""
        asyncio.run_coroutine_threadsafe(work, self.server.servers[0].get_loop()).result(20)

    async def cut(self) -> None:
        """All connections, as a network does: nobody is told anything."""
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()

    async def vanish(self) -> None:
        for listening in self.server.servers:
            listening.close()
        await self.cut()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.client.close()


@pytest.fixture
def puppets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Puppets]]:
    """Makes servers of puppets; takes what `ServerConfig` takes."""
    # ICE leaves the loopback interface out; a test may have no other.
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    with contextlib.ExitStack() as stack:

        def make(host: PuppetHost | None = None, *, ready: bool = True, **config: Any) -> Puppets:
            config = {"port": 0, "tts": "off", "rows": 256, "limits": FAR} | config
            settings = ServerConfig(data=tmp_path / "data", **config)
            made = Puppets(host or PuppetHost(), settings, ready=ready)
            stack.callback(made.stop)
            return made

        yield make
