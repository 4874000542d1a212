"""Making recordings: both splits, what exists is kept, what is missing is named in one line."""

from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.cli import run
from lavatar_jax.data import speech
from tools.make_speech import main


def test_recordings_of_both_splits_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, str]] = []

    def recording(index: int, split: str, seconds: float, *, cache: Path) -> np.ndarray:
        made.append((index, split))
        return np.zeros(16_000, np.float32)

    monkeypatch.setattr(speech, "recording", recording)
    main(["--out", str(tmp_path), "--train", "2", "--heldout", "1"])
    assert made == [(0, "train"), (1, "train"), (0, "heldout")]
    (tmp_path / "train" / "00001.wav").unlink()
    main(["--out", str(tmp_path), "--train", "2", "--heldout", "1"])
    assert made[3:] == [(1, "train")]


def test_a_missing_program_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(lambda: main(["--out", str(tmp_path / "speech")])) == 2
    assert "install it, e.g. apt-get install flite" in capsys.readouterr().err
    assert not (tmp_path / "speech" / "train").exists()
