"""The command line that looks for the watermark: one line, and an exit code."""

from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.cli import run
from lavatar_jax.inference.video import VideoWriter
from lavatar_jax.serving.watermark import Watermark
from tools.detect_watermark import main


def exit_code(*args: str | Path) -> int:
    try:
        return run(lambda: main([str(arg) for arg in args]))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_found_not_found_and_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, key = tmp_path / "v.mp4", tmp_path / "key"
    key.write_bytes(b"another\n")
    y, x = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    frames = np.stack([np.stack([y // 2 + 60, x // 2 + 60, y // 3 + x // 3], axis=-1)] * 5).astype(np.uint8)
    with VideoWriter(video) as writer:
        writer.write(Watermark().embed(frames))
    assert exit_code(video) == 0
    assert "watermark found: score" in capsys.readouterr().out
    assert exit_code(video, "--key-file", key) == 1
    assert "watermark not found: score" in capsys.readouterr().out
    for args in ([tmp_path / "none.mp4"], [key], [video, "--key-file", tmp_path / "none"], []):
        assert exit_code(*args) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
