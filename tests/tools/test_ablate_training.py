"""Which trainings the variants are made of, and that what is done is not done again."""

from pathlib import Path

import pytest

from lavatar_jax.errors import UserError
from tools import ablate_training
from train import load_config


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The trainings that were asked for, by a stand-in that takes no time."""
    calls: list[tuple[str, list[str]]] = []

    def package(arguments: ablate_training.Arguments) -> Path:
        folder = Path(arguments.out)
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        return folder

    monkeypatch.setattr(ablate_training, "train", lambda config, options: calls.append((config, options)))
    monkeypatch.setattr(ablate_training, "package", package)
    return calls


def option(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


def test_every_variant_is_trained_once_from_the_same_teacher_for_the_same_time(
    trained: list[tuple[str, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--teacher", "T", "--seconds", "60", "--out", str(tmp_path), "--", "--data.folder", "D"]
    ablate_training.main([*call[:-3], "--only", "short", "cache", "--", *call[-2:]])
    assert [option(options, "--out") for _, options in trained] == [
        str(tmp_path / name) for name in ("stage-2-short", "clean-cache", "fixed-noise-cache")
    ]
    ablate_training.main(call)
    runs = [option(options, "--out") for _, options in trained]
    assert len(runs) == len(set(runs)) == len(ablate_training.VARIANTS) + 1, "one more for the ODE stage"
    assert all(option(options, "--data.folder") == "D" for _, options in trained)
    seconds = {option(options, "--out"): float(option(options, "--train.seconds")) for _, options in trained}
    paths, after = str(tmp_path / "ODE-initialised-paths"), str(tmp_path / "ODE-initialised")
    assert seconds.pop(paths) + seconds.pop(after) == 60
    assert set(seconds.values()) == {60}
    last = trained[-1][1]
    assert (option(last, "--init"), option(last, "--teacher")) == (paths, "T")
    assert f"--model 'clean cache={tmp_path}/models/clean-cache'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ablate_training.VARIANTS)
def test_every_variant_is_a_run_that_stage_2_understands(name: str) -> None:
    import tyro

    default = load_config(str(ablate_training.ROOT / ablate_training.STAGE_2))
    changed = tyro.cli(type(default), default=default, args=list(ablate_training.VARIANTS[name]))
    assert (changed == default) == (not ablate_training.VARIANTS[name])


def test_what_is_wrong_is_said(trained: list[tuple[str, list[str]]]) -> None:
    with pytest.raises(UserError, match="no variant has nothing in its name"):
        ablate_training.main(["--only", "nothing"])


def test_a_failed_training_ends_the_call() -> None:
    with pytest.raises(UserError, match="exit code 2"):
        ablate_training.train("configs/none.py", [])
