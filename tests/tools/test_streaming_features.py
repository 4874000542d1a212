import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.checkpoints.conversion import Task, convert_folder
from lavatar_jax.data.speech import write_wav
from tests.published import write_published
from tools.pth import PickledTensors
from tools.streaming_features import distance, fixed_ratio, load_model, measure

ROOT = Path(__file__).resolve().parents[2]


def test_distance_is_relative_and_knows_the_parts_of_a_block():
    want = np.ones((2, 24, 3), np.float32)
    got = want.copy()
    got[:, 9:12] = 3  # the last quarter of the first of two blocks
    assert distance([got], [want]) == pytest.approx(np.sqrt(4 * 3 / 24))
    assert distance([got], [want], 0) == 0
    assert distance([got], [want], 3) == pytest.approx(np.sqrt(4 / 2))


def test_the_fixed_ratio_ends_with_the_states():
    states = np.arange(10.0, dtype=np.float32).reshape(1, 10, 1)
    assert fixed_ratio(states, 6)[0, :, 0] == pytest.approx([0, 5 / 3, 10 / 3, 20 / 3, 25 / 3, 9])


def test_the_report_covers_each_lookahead(tmp_path):
    random = np.random.default_rng(0)
    write_wav(tmp_path / "noise.wav", (0.1 * random.standard_normal(40_000)).astype(np.float32))
    options = ["--layers", "1", "--width", "16", "--conv-width", "8", "--audio", str(tmp_path / "noise.wav")]
    command = [sys.executable, "tools/streaming_features.py", *options, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "random weights; 1 recordings, 2 s" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["lookahead_ms"] for row in rows] == [None, 0, 80, 160, 320, 80]
    assert rows[-1]["features"] == "log-mel"
    assert rows[-1]["to_reference"] == 0  # streams exactly
    assert all(0 < row["to_reference"] < 1.5 for row in rows[:-1])
    assert done.stdout.count("| wav2vec2 |") == 4


def test_a_converted_model_is_measured(tmp_path):
    pytest.importorskip("torch")
    source = write_published(tmp_path)
    convert_folder(Task(wan=source.wan, out=tmp_path / "model"), PickledTensors)
    model = load_model(str(tmp_path / "model"))
    want = source.speech["wav2vec2.encoder.layers.1.attention.q_proj.weight"].T
    assert np.array_equal(model.layers.q.weight[...][1], want)
    sound = (0.1 * np.random.default_rng(0).standard_normal(40_000)).astype(np.float32)
    rows = {row.lookahead_ms: row for row in measure(model, [sound], 125)[:-1]}
    assert rows[320].to_fixed_ratio < rows[0].to_fixed_ratio < 1


def test_a_model_without_wav2vec2_is_a_clear_error():
    command = [sys.executable, "tools/streaming_features.py", "--model", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "listens to log-mel features" in done.stderr
