"""The benchmark of a training step measures what train.py does, and says what did not run."""

import json
from pathlib import Path

import pytest

from lavatar_jax.errors import UserError
from tools import bench_train

SMALL = ["--model.layers", "1", "--model.width", "24", "--model.heads", "1", "--model.ffn-width", "24"]
SMALL += ["--model.inject-layers", "0", "--train.batch", "1", "--clip", "3", "4", "4"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench_train.py", *arguments])
    return bench_train.main()


def test_a_step_is_timed_as_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tmp_path / "found.json"
    arguments = ["configs/tiny_dit.py", *SMALL, "--windows", "2", "--json", str(found)]
    assert run(monkeypatch, *arguments) == 0
    report = json.loads(found.read_text())
    row = report["results"][""]
    assert 0 < row["slowest"] <= row["samples_per_second"] <= row["fastest"]
    assert row["step_ms"] == pytest.approx(1e3 / row["samples_per_second"])
    assert row["temporary_gb"] > 0 < row["compile_seconds"]
    assert report["command"].endswith(" ".join(arguments))


def test_what_a_variant_cannot_have_is_told_before_any_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_train, "measure", lambda *_: pytest.fail("nothing should be measured"))
    for arguments, message in (
        (["configs/tiny_dit.py", "--variant", "--train.batch 0"], "batch must be more than 0"),
        (["configs/tiny_dit.py", "--variant", "--train.bach 4"], "train.bach"),
        (["configs/tiny_vae.py"], "only stages that train on records"),
        (["configs/tiny_dit.py", "--windows", "0"], "--windows 0"),
        (["configs/tiny_dit.py", "--json", str(tmp_path)], "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *arguments)


@pytest.mark.parametrize(("code", "expected"), [(1, "RESOURCE_EXHAUSTED: an error"), (-9, "no word")])
def test_a_variant_that_ends_by_itself_is_shown_as_failed(
    code: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "print('RESOURCE_EXHAUSTED: an error'); print('bye'); sys.exit(1)"
    end = words if code == 1 else "os.kill(os.getpid(), 9)"
    (tmp_path / "train.py").write_text(f"import os, sys\n{end}\n")
    monkeypatch.setattr(bench_train, "ROOT", tmp_path)
    assert run(monkeypatch, "configs/tiny_dit.py", *SMALL) == 1
    assert f"as configured: {expected}" in capsys.readouterr().out
