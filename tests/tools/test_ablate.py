"""The ablation's table, its list of variants, and that it goes on where it was."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from lavatar_jax.checkpoints.store import model_folder
from lavatar_jax.errors import UserError
from tools import ablate


def test_the_table_has_mean_and_spread_of_what_was_measured() -> None:
    runs = [{"openness": 0.9, "fps": 80.0, "at_10": 2.0}, {"openness": 0.8, "fps": 100.0}]
    header, _, row = ablate.spread({"as shipped": runs}).splitlines()
    assert header == "| | lip-sync | colour at 10 s | frames/s |"
    assert row == "| as shipped | 0.850 ± 0.050 | 2.0 | 90 ± 10 |"


def test_variants_of_stage_1_need_its_model() -> None:
    names = [variant.name for variant in ablate.variants("tiny", None, {"no scaffold": "folder"})]
    assert "no scaffold" in names
    assert not any("stage 1" in name for name in names)
    assert "stage 1, 4 steps" in [variant.name for variant in ablate.variants("tiny", "forcing", {})]


@pytest.fixture
def measured(monkeypatch) -> list[str | tuple[str, int]]:
    """What was measured, by a stand-in that takes no time."""
    calls = []

    def talk_clips(avatar, clips, *, seed: int) -> list[int]:
        calls.append(("talk", seed))
        return [seed]

    def drift(avatar, clips, speech, moments, seed: int) -> dict[str, float]:
        calls.append(("drift", seed))
        return {f"at_{moment:.0f}": moment / 10 for moment in moments}

    monkeypatch.setattr(ablate, "talk_clips", talk_clips)
    monkeypatch.setattr(ablate, "drift", drift)
    monkeypatch.setattr(ablate, "speech_numbers", lambda videos, *_: {"openness": 0.5 + videos[0] / 10})
    monkeypatch.setattr(ablate, "colour_numbers", lambda *_: {})
    monkeypatch.setattr(ablate, "speed", lambda *_: calls.append("speed") or {"fps": 50.0})
    monkeypatch.setattr(
        ablate, "held_out_clips", lambda *_: [SimpleNamespace(identity=None, video=np.zeros((1, 8, 8, 3)))]
    )
    monkeypatch.setattr(ablate.FaceProbe, "calibrate", lambda *_: None)
    monkeypatch.setattr(ablate, "draw", lambda *_: None)
    return calls


def test_a_kept_result_is_not_measured_again(tmp_path, measured, capsys) -> None:
    arguments = ["--only", "no sink", "--seeds", "2", "--out", str(tmp_path)]
    ablate.main(arguments)
    (tmp_path / "no-sink.1.json").unlink()
    ablate.main(arguments)
    assert measured == [("talk", 0), "speed", ("drift", 0), *2 * [("talk", 1), "speed", ("drift", 1)]]
    row = "| no sink | 0.550 ± 0.050 | 1.0 ± 0.0 | 10.0 ± 0.0 | 50 ± 0 |"
    assert row in (tmp_path / "ablation.md").read_text()


def test_speed_can_wait_for_a_quiet_machine(tmp_path, measured, capsys) -> None:
    arguments = ["--only", "no sink", "--seeds", "1", "--out", str(tmp_path)]
    ablate.main([*arguments, "--no-speed"])
    assert "frames/s" not in capsys.readouterr().out
    ablate.main(arguments)
    assert measured == [("talk", 0), ("drift", 0), "speed"]
    assert "| 50 |" in capsys.readouterr().out


def test_a_longer_drift_adds_its_columns_only(tmp_path, measured, capsys) -> None:
    arguments = ["--only", "no sink", "--seeds", "1", "--out", str(tmp_path)]
    ablate.main(arguments)
    ablate.main([*arguments, "--drift-seconds", "1000"])
    ablate.main(arguments)
    assert measured == [("talk", 0), "speed", ("drift", 0), ("drift", 0)]
    row = "| no sink | 0.500 | 1.0 | 10.0 | 100.0 | 50 |"
    assert row in capsys.readouterr().out


def test_results_of_another_model_are_not_taken_for_those_of_this_one(
    tmp_path, measured, capsys, monkeypatch
) -> None:
    arguments = ["--only", "no sink", "--seeds", "1", "--out", str(tmp_path)]
    ablate.main(arguments)
    for changed in (["--clips", "3"], ["--speech", "elsewhere"]):
        with pytest.raises(UserError, match=r"no-sink\.0\.json has results of another model"):
            ablate.main([*arguments, *changed])
    another = tmp_path / "another"
    shutil.copytree(model_folder("tiny"), another)
    (another / "MODEL_CARD.md").write_text("other words, the same model")
    ablate.main([*arguments, "--student", str(another)])
    ablate.digest.cache_clear()  # a model does not change while it is measured
    config = another / "config.json"
    config.write_text(config.read_text().replace('"fps": 25', '"fps": 24'))
    with pytest.raises(UserError, match="results of another model"):
        ablate.main([*arguments, "--student", str(another)])


def test_blocks_of_all_lengths_see_as_much_history() -> None:
    blocks = [v.changes for v in ablate.variants("tiny", None, {}) if v.name.startswith("block")]
    assert {changes["block_frames"] * changes["ring_blocks"] for changes in blocks} == {12}


def test_the_picture_is_drawn(tmp_path) -> None:
    ablate.draw({"a": [{"at_10": 1.0, "at_100": 2.0}, {"at_10": 1.5, "at_100": 2.5}]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_one_moment_is_no_line(tmp_path) -> None:
    ablate.draw({"a": [{"at_10": 1.0}]}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model", "folder"], "NAME=FOLDER"),
        (["--only", "nothing of this name"], "no variant has"),
        (["--model", "2 steps=folder"], "has this name already"),
    ],
)
def test_wrong_arguments_get_one_line(wrong, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        ablate.main([*wrong, "--out", str(tmp_path)])
