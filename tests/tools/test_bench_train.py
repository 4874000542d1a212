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
        (["configs/tiny_vae.py"], "only stage 1, stage 2 and the ODE stage"),
        (["configs/tiny_dit.py", "--windows", "0"], "--windows 0"),
        (["configs/tiny_dit.py", "--json", str(tmp_path)], "is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *arguments)


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Another train.py."""
    (folder / "train.py").write_text("import json, os, sys, time\nfrom pathlib import Path\n" + program)
    monkeypatch.setattr(bench_train, "ROOT", folder)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("print('RESOURCE_EXHAUSTED: an error'); print('bye'); sys.exit(1)", "exit code 1: RESOURCE_EXH"),
        (
            "print('error: a batch of 1'); sys.exit(2)",
            "exit code 2: error: a batch of 1",
        ),
        ("os.kill(os.getpid(), 9)", "exit code -9: no word"),
    ],
)
def test_a_variant_that_ends_by_itself_is_shown_as_failed(
    end: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(tmp_path, monkeypatch, end)
    assert run(monkeypatch, "configs/tiny_dit.py", *SMALL) == 1
    assert f"as configured: {expected}" in capsys.readouterr().out


LOGGED = """
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
lines = [{"program": {"step": 0, "devices": 3, "compile_seconds": 7.0, "temporary_gb": 0.5}}]
lines += [{"step": 6 * i, "samples_per_second": rate, "mfu": rate / 10, "peak_gb": rate}
          for i, rate in enumerate((100.0, 2.0, 4.0, 50.0), 1)]
(out / "log.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
Path(__file__).with_name("arguments").write_text(" ".join(sys.argv))
time.sleep(100)
"""


def test_windows_after_the_first_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, LOGGED)
    options = [*SMALL, "--train.batch", "2", "--distill.update-ratio", "3", "--lora.rank", "2"]
    row = bench_train.measure("configs/tiny_distill.py", options, windows=2)
    assert row == {
        "step_ms": pytest.approx(750.0),  # 2 samples at 2.67 a second
        "samples_per_second": pytest.approx(8 / 3),
        "slowest": 2.0,
        "fastest": 4.0,
        "devices": 3,
        "compile_seconds": 7.0,
        "temporary_gb": 0.5,
        "mfu": pytest.approx(0.8 / 3),
        "peak_gb": 4.0,
    }
    said = (tmp_path / "arguments").read_text()
    assert "--train.log-every 6 " in said, "whole turns of the student"
    assert "--distill.critic-warmup 0" in said
    assert "--init None" in said
    assert "--lora.init None" in said
    assert "--teacher None" in said
