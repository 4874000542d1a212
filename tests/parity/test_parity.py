"""Every recorded case of the PyTorch reference is recomputed; and the tool that does so can fail."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.shared import SHARED, shared_path
from tools import check_parity
from tools.check_parity import CHECKS, excess, find_check, run_case
from tools.parity.case import EXACT, Case, Check
from tools.parity_table import insert, table

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.name for path in SHARED.glob("golden/*") if find_check(path.name))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_recorded_case_is_reproduced_in_every_tensor(name: str, capsys) -> None:
    result = run_case(SHARED / "golden" / name, verbose=True)
    text = capsys.readouterr().out
    assert result.passed, text
    assert result.tensors == len(text.splitlines()) - 1 > 0


def test_the_cases_that_must_pass_are_there() -> None:
    shared_path("golden")
    numbers = {re.match(r"\d+[a-z]?\d?", name)[0] for name in FOLDERS}
    assert numbers == CHECKS.keys()
    assert {number[:2] for number in numbers} >= {"01", "02", "03", "04", "05", "06", "07", "08", "09", "12"}


# The tool itself


@pytest.fixture
def small_case(tmp_path: Path) -> Path:
    """A copy of a case that takes no time, to be spoilt."""
    return Path(shutil.copytree(shared_path("golden/08c_euler_scheduler"), tmp_path / "08c_euler_scheduler"))


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "outputs.safetensors")
    change(tensors)
    save_file(tensors, folder / "outputs.safetensors")


def test_the_tool_reports_each_case_and_exits_with_1_if_one_fails(small_case: Path, tmp_path: Path) -> None:
    wrong = Path(shutil.copytree(small_case, tmp_path / "wrong"))
    spoil(wrong, lambda tensors: tensors["sigmas_0"].__setitem__(0, 0.5))
    unknown = Path(shutil.copytree(small_case, tmp_path / "unknown"))
    info = json.loads((unknown / "case.json").read_text())
    (unknown / "case.json").write_text(json.dumps(info | {"case": "99_unheard_of"}))

    def check(*folders: Path, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        command = [sys.executable, "tools/check_parity.py", *map(str, folders), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    code, lines = check(small_case, wrong, unknown, tmp_path / "missing")
    assert code == 1
    assert len(lines) == 5
    assert re.fullmatch(r"PASS 08c_euler_scheduler \d\.\d\de-\d\d rtol=1e-06,atol=1e-06", lines[0])
    assert re.fullmatch(r"FAIL 08c_euler_scheduler 5\.00e-01 rtol=1e-06,atol=1e-06", lines[1])
    assert lines[2] == "FAIL 99_unheard_of inf rtol=0,atol=0 unknown case, no check is written for it"
    assert lines[3].startswith("FAIL missing inf rtol=0,atol=0 unreadable: ")
    assert lines[4] == "1 passed, 3 failed"

    code, lines = check(small_case, options=("-v",))
    assert code == 0
    assert lines[-1] == "1 passed, 0 failed"
    assert all(line.startswith("  ok   ") for line in lines[:-2])
    assert len(lines) > 5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors["x_1_final"].fill(np.nan), ""),
        (lambda tensors: tensors.update(x_1_final=tensors["x_1_final"][:-1].copy()), ""),
        (lambda tensors: tensors.pop("timesteps_0"), "KeyError: 'timesteps_0'"),
    ],
)
def test_nan_wrong_shapes_and_missing_outputs_fail(small_case: Path, change, problem: str) -> None:
    assert run_case(small_case).passed
    spoil(small_case, change)
    result = run_case(small_case)
    assert not result.passed
    assert result.problem == problem
    assert problem or result.error == np.inf


def test_a_damaged_file_fails(small_case: Path) -> None:
    (small_case / "inputs.safetensors").write_bytes(b"not tensors")
    result = run_case(small_case)
    assert not result.passed
    assert result.problem.startswith("unreadable")


@pytest.mark.parametrize("text", ["[]", '{"case": 8}', '{"case": "08c", "outputs": 3}'])
def test_a_case_of_another_form_fails_and_the_others_go_on(small_case: Path, text: str) -> None:
    (small_case / "case.json").write_text(text)
    result = run_case(small_case)
    assert not result.passed
    assert "\n" not in str(result)
    assert result.problem


def test_a_missing_file_of_outputs_fails(small_case: Path) -> None:
    (small_case / "outputs.safetensors").unlink()
    result = run_case(small_case)
    assert not result.passed
    assert result.problem.startswith("unreadable")


def test_a_variant_without_its_file_fails(small_case: Path) -> None:
    info = json.loads((small_case / "case.json").read_text())
    variants = {"variant_outputs": {"fast": info["outputs"]}}
    (small_case / "case.json").write_text(json.dumps(info | variants))
    result = run_case(small_case)
    assert not result.passed
    assert result.problem.startswith("unreadable")
    assert "outputs_fast.safetensors" in result.problem


@pytest.mark.parametrize("add", ["file", "tensor", "name", "drawn"])
def test_an_output_that_nothing_is_compared_with_fails(small_case: Path, add: str, capsys) -> None:
    info, extra = json.loads((small_case / "case.json").read_text()), np.zeros(2, np.float32)
    missed = {"file": "extra (fast)", "tensor": "extra", "name": "extra"}
    if add == "file":
        save_file({"extra": extra}, small_case / "outputs_fast.safetensors")
    elif add == "name":
        (small_case / "case.json").write_text(json.dumps(info | {"outputs": {"extra": {}}}))
    else:
        name = {"tensor": "extra", "drawn": "noise.c0"}[add]  # drawn numbers are what a case starts from
        spoil(small_case, lambda tensors: tensors.update({name: extra}))
    result = run_case(small_case)
    assert result.passed == (add == "drawn")
    assert result.problem == (f"not compared: {missed[add]}" if add in missed else "")
    assert result.problem in capsys.readouterr().out


def test_an_output_that_the_check_passes_over_fails(small_case: Path, monkeypatch) -> None:
    of_case = CHECKS["08c"]

    def all_but_one(case: Case):
        return (check for check in of_case(case) if check.name != "sigmas_1")

    monkeypatch.setitem(check_parity.CHECKS, "08c", all_but_one)
    result = run_case(small_case)
    assert not result.passed
    assert result.problem == "not compared: sigmas_1"


def test_a_case_without_comparisons_fails(small_case: Path, monkeypatch) -> None:
    monkeypatch.setitem(check_parity.CHECKS, "08c", lambda case: iter(()))
    assert not run_case(small_case).passed


def test_errors_are_weighed_by_both_tolerances() -> None:
    def ratio(got, want, tolerance) -> float:
        return excess(Check("", np.asarray(got), np.asarray(want), tolerance))[0]

    assert ratio([1.0, 2.0], [1.0, 2.0], EXACT) == 0
    assert ratio([1.0], [1.0 + 1e-12], EXACT) > 1
    assert ratio([100.5], [100.0], (0.01, 0.0)) == pytest.approx(0.5)
    assert ratio([0.5], [0.0], (0.01, 0.25)) == pytest.approx(2)
    assert ratio([[1.0]], [1.0], (1.0, 1.0)) == np.inf
    assert ratio([np.inf], [np.inf], (1.0, 1.0)) == np.inf


# The table


def test_the_table_names_what_is_compared_and_what_is_not(small_case: Path) -> None:
    folders = [small_case, small_case.parent / "10_umt5_encoder"]
    lines = table(folders, [run_case(small_case), None]).splitlines()
    assert "jax " in lines[0]
    assert "1 of 1 compared cases passed" in lines[0]
    assert re.match(
        r"\| 08c_euler_scheduler \| - \| 9\d* \| \d\.\de-\d\d \| rtol 1e-06, atol 1e-06 \| pass \|", lines[-2]
    )
    assert lines[-1] == "| 10_umt5_encoder | | | | | not yet implemented |"


def test_the_table_replaces_the_old_one_and_nothing_else() -> None:
    document = "before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n"
    once = insert(document, "new")
    assert once == "before\n<!-- table -->\n\nnew\n\n<!-- end of table -->\nafter\n"
    assert insert(once, "new") == once
    with pytest.raises(ValueError, match="needs one line"):
        insert("no marks", "new")


def test_the_document_knows_every_case() -> None:
    """docs/parity.md is as wide as the recorded data: a new case needs a new table."""
    text = (ROOT / "docs/parity.md").read_text()
    missing = [path.name for path in shared_path("golden").iterdir() if f"| {path.name} |" not in text]
    assert missing == []
    assert "FAIL" not in text
