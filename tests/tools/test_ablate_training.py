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

    def train(config: str, out: Path, steps: int, options: list[str]) -> None:
        calls.append((config, ["--out", str(out), "--train.steps", str(steps), *options]))

    def package(arguments: ablate_training.Arguments) -> Path:
        folder = Path(arguments.out)
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        return folder

    monkeypatch.setattr(ablate_training, "train", train)
    monkeypatch.setattr(ablate_training, "package", package)
    return calls


def option(options: list[str], name: str) -> str:
    return options[options.index(name) + 1]


def test_every_variant_is_trained_once_from_the_same_teacher_for_as_many_steps(
    trained: list[tuple[str, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["--teacher", "T", "--steps", "60", "--out", str(tmp_path), "--", "--data.folder", "D"]
    ablate_training.main([*call[:-3], "--only", "stage 2", "cache", "--", *call[-2:]])
    assert [option(options, "--out") for _, options in trained] == [
        str(tmp_path / name) for name in ("stage-2-short", "clean-cache", "fixed-noise-cache")
    ]
    ablate_training.main(call)
    runs = {option(options, "--out").removeprefix(f"{tmp_path}/"): options for _, options in trained}
    assert len(trained) == len(runs) == len(ablate_training.VARIANTS) + 3
    own = runs["portraits-as-references"]
    assert all(option(options, "--data.folder") == "D" for options in runs.values())
    assert [name for name, options in runs.items() if options.count("--data.folder") == 2] == [
        "portraits-as-references"
    ]
    assert own[-2:] == ["--data.folder", f"{tmp_path}/portraits-as-references-latents"], "the last one counts"
    steps = {name: int(option(options, "--train.steps")) for name, options in runs.items()}
    paths, scaffold = "ODE-initialised-paths", "short-stage-1-with-scaffold"
    assert steps.pop(paths) + steps.pop("ODE-initialised") == 60
    assert steps.pop("short-stage-1-forcing") == steps.pop(f"{scaffold}-forcing") == 600
    assert set(steps.values()) == {60}
    after = runs["ODE-initialised"]
    assert (option(after, "--init"), option(after, "--teacher")) == (str(tmp_path / paths), "T")
    assert option(runs[scaffold], "--init") == str(tmp_path / f"{scaffold}-forcing")
    guided = {name: o for name, o in runs.items() if not name.endswith("-forcing")}
    assert all("--loss.text-guidance" in options for options in guided.values())
    unguided = runs["no-guidance"]
    last = len(unguided) - unguided[::-1].index("--loss.text-guidance")
    assert unguided[last] == "0", "the last one counts"
    assert all("--model.use-motion" in runs[name] for name in (scaffold, f"{scaffold}-forcing"))
    assert f"--model 'clean cache={tmp_path}/models/clean-cache'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ablate_training.VARIANTS)
def test_every_variant_is_a_run_that_its_stages_understand(name: str) -> None:
    import tyro

    variant = ablate_training.VARIANTS[name]
    for config, options in (
        (ablate_training.STAGE_1, variant.forcing),
        (ablate_training.STAGE_2, variant.options + variant.data),
    ):
        default = load_config(str(ablate_training.ROOT / config))
        changed = tyro.cli(type(default), default=default, args=list(options or ()))
        assert (changed == default) == (not options)


def test_what_is_wrong_is_said(trained: list[tuple[str, list[str]]]) -> None:
    with pytest.raises(UserError, match="no variant has nothing in its name"):
        ablate_training.main(["--only", "nothing"])


@pytest.mark.parametrize("changed", [("--steps", "61"), ("--teacher", "U"), ("--", "--seed", "2")])
def test_students_of_other_settings_are_not_taken_for_these(
    trained: list[tuple[str, list[str]]], tmp_path: Path, changed: tuple[str, ...]
) -> None:
    call = ["--only", "short", "--out", str(tmp_path), "--steps", "60", "--teacher", "T"]
    ablate_training.main(call)
    before = len(trained)
    ablate_training.main(call)
    with pytest.raises(UserError, match=r"was trained with .*choose another --out"):
        ablate_training.main([*call, *changed])
    assert len(trained) == before


def test_a_failed_training_ends_the_call(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exit code 2"):
        ablate_training.train("configs/none.py", tmp_path, 1, [])


def test_a_training_that_was_stopped_gives_no_student(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SIGTERM: it saves, and its exit code is 130."""
    stopped = tmp_path / "python"
    stopped.write_text("#!/bin/sh\nexit 130\n")
    stopped.chmod(0o755)
    monkeypatch.setattr(ablate_training.sys, "executable", str(stopped))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="stopped at step 3 of 5"):
        ablate_training.train("configs/none.py", tmp_path, 5, [])
    ablate_training.train("configs/none.py", tmp_path, 3, [])
