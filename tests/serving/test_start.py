"""From the command line to a server: what `live` and `livekit` load, and what they say before they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from lavatar_jax.cli import run
from lavatar_jax.errors import UserError
from lavatar_jax.inference.load_host import prepare_host
from lavatar_jax.parallel import PipelineLayout
from lavatar_jax.serving.live import Live

ROOT = Path(__file__).resolve().parents[2]
ONE = PipelineLayout(stages=1, own_decoder=False)


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[PipelineLayout]:
    """Of the hosts that would have been made."""
    found: list[PipelineLayout] = []

    def make(avatar: Any, slots: int, layout: PipelineLayout, **_: Any) -> None:
        found.append(layout)

    monkeypatch.setattr("lavatar_jax.inference.load_host.SessionHost", make)
    return found


@pytest.mark.parametrize(
    ("devices", "layout"), [(1, ONE), (4, PipelineLayout(own_decoder=False)), (5, PipelineLayout())]
)
def test_devices_are_those_of_generate(
    layouts: list[PipelineLayout], devices: int, layout: PipelineLayout
) -> None:
    """Of nine that are there."""
    prepare_host("tiny", devices)(1)
    assert layouts == [layout]


@pytest.mark.parametrize("devices", [7, 16])
def test_devices_that_do_not_work_are_told_before_the_model_is_loaded(
    layouts: list[PipelineLayout], devices: int
) -> None:
    with pytest.raises(UserError, match=f"--devices {devices}: "):
        prepare_host("tiny", devices)
    assert layouts == []


def test_a_cpu_shows_as_many_devices_as_are_asked_for() -> None:
    """In a process that has computed nothing yet, as that of `serve.py live --devices 5`."""
    code = """
import jax
from lavatar_jax.inference.load_host import prepare_host
prepare_host("tiny", 5)
print(len(jax.devices()))
"""
    clean = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert shown.stdout.strip() == "5", shown.stderr


def test_live_hands_its_devices_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def prepare(model: str, devices: int) -> None:
        asked.append((model, devices))
        raise UserError("enough")

    monkeypatch.setattr("lavatar_jax.inference.load_host.prepare_host", prepare)
    assert run(Live(port=18_765, devices=3).run) == 2
    assert asked == [("tiny", 3)]
