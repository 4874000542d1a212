"""Every command answers `--help`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavatar_jax.cli import configure_jax
from lavatar_jax.evaluation.devices import USABLE_MEMORY

ROOT = Path(__file__).parents[1]
TOOLS = [path for path in sorted(ROOT.glob("tools/*.py")) if "__main__" in path.read_text()]
COMMANDS = [
    ("serve.py",),
    *(("serve.py", name) for name in ("generate", "live", "livekit")),
    ("train.py",),
    *(("train.py", str(path.relative_to(ROOT))) for path in sorted(ROOT.glob("configs/*.py"))),
    *((str(path.relative_to(ROOT)),) for path in TOOLS),
]


# Runs all of them, one after the other: most of the time of each is that of the same imports.
ASK_ALL = """
import contextlib, io, json, os, runpy, sys
sys.path.insert(0, os.getcwd())
environment, answers = dict(os.environ), []
for path, *rest in json.loads(sys.stdin.read()):
    sys.argv, said, code = [path, *rest, "--help"], io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    answers.append((code, said.getvalue()))
    os.environ.clear()
    os.environ.update(environment)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, ...], tuple[int | None, str]]:
    """The exit code of each command, and what it said."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    asked = subprocess.run(
        [sys.executable, "-c", ASK_ALL],
        input=json.dumps(COMMANDS), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    return dict(zip(COMMANDS, map(tuple, json.loads(asked.stdout.splitlines()[-1])), strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_answers_help(
    answers: dict[tuple[str, ...], tuple[int | None, str]], command: tuple[str, ...]
) -> None:
    code, said = answers[command]
    assert code == 0, said
    assert "usage: " in said


@pytest.mark.parametrize("command", ["serve.py", "train.py", "tools/check_parity.py"])
def test_help_is_answered_anywhere_and_leaves_nothing(command: str, tmp_path: Path) -> None:
    call = [sys.executable, str(ROOT / command), "--help"]
    shown = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "usage: " in shown.stdout
    assert not list(tmp_path.iterdir())


def test_commands_take_the_memory_that_plans_count_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    configure_jax()
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == USABLE_MEMORY
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    configure_jax()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
