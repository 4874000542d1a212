"""The tool that measures a live server, interrupted: what it has so far is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

import aioice.ice

from tests.serving.test_faults import real
from tools import measure_live


def test_what_came_until_then_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])

    async def scene(server: Any) -> dict[str, Any]:
        measuring = asyncio.create_task(measure_live.measure(server.url(), 600.0))
        while not any(room.connections for room in server.sessions.open_rooms):
            await asyncio.sleep(0.02)
        await asyncio.sleep(3.0)
        measuring.cancel()  # as Ctrl-C does
        return await measuring

    with real(tmp_path) as server:
        found = asyncio.run(asyncio.wait_for(scene(server), 60))
        assert not server.sessions.open_rooms
    assert 0 < found["interrupted_after_seconds"] < 60
    assert found["seconds"] > 0
    assert found["frames_per_second"] > 1


def test_it_says_that_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def some(url: str, seconds: float) -> dict[str, Any]:
        return {"frames_per_second": 25.0, "interrupted_after_seconds": 3.5}

    async def nothing(url: str, seconds: float) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["measure_live.py"])
    monkeypatch.setattr(measure_live, "offer_loopback", lambda: None)
    monkeypatch.setattr(measure_live, "measure", some)
    assert measure_live.main() == 130
    told = capsys.readouterr()
    assert json.loads(told.out)["frames_per_second"] == 25.0
    assert "interrupted after 3.5 s of 600 s" in told.err
    monkeypatch.setattr(measure_live, "measure", nothing)
    assert measure_live.main() == 130
    assert "before anything was measured" in capsys.readouterr().err
