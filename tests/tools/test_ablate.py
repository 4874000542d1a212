"""The ablation's table, its list of variants, and that it goes on where it was."""

import pytest

from lavatar_jax.errors import UserError
from tools import ablate


def test_the_table_has_mean_and_spread_of_what_was_measured() -> None:
    runs = [{"openness": 0.9, "fps": 80.0, "at_10": 2.0}, {"openness": 0.8, "fps": 100.0}]
    header, _, row = ablate.spread({"as shipped": runs}).splitlines()
    assert header == "| | lip-sync | colour at 10 s | frames/s |"
    assert row == "| as shipped | 0.850 ± 0.050 | 2.0 ± 0.0 | 90 ± 10 |"


def test_variants_of_stage_1_need_its_model() -> None:
    names = [variant.name for variant in ablate.variants("tiny", None, {"no scaffold": "folder"})]
    assert "no scaffold" in names
    assert not any("stage 1" in name for name in names)
    assert "stage 1, 4 steps" in [variant.name for variant in ablate.variants("tiny", "forcing", {})]


def test_a_kept_result_is_not_measured_again(tmp_path, monkeypatch, capsys) -> None:
    measured = []

    def measure(variant, seed, *_: object) -> dict[str, float]:
        measured.append((variant.name, seed))
        return {"openness": 0.5 + seed / 10, "at_10": 1.0, "at_100": 2.0}

    monkeypatch.setattr(ablate, "measure", measure)
    monkeypatch.setattr(ablate, "held_out_clips", lambda *_: [])
    monkeypatch.setattr(ablate, "draw", lambda *_: None)
    arguments = ["--only", "no sink", "--seeds", "2", "--out", str(tmp_path)]
    ablate.main(arguments)
    (tmp_path / "no-sink.1.json").unlink()
    ablate.main(arguments)
    assert measured == [("no sink", 0), ("no sink", 1), ("no sink", 1)]
    assert "| no sink | 0.550 ± 0.050 | 1.0 ± 0.0 | 2.0 ± 0.0 |" in (tmp_path / "ablation.md").read_text()


def test_the_picture_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="ablate.py draws with the extra `plots`")
    ablate.draw({"a": [{"at_10": 1.0, "at_100": 2.0}, {"at_10": 1.5, "at_100": 2.5}]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize("wrong", [["--model", "folder"], ["--only", "nothing of this name"]])
def test_wrong_arguments_get_one_line(wrong, tmp_path) -> None:
    with pytest.raises(UserError):
        ablate.main([*wrong, "--out", str(tmp_path)])
