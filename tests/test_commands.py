"""Every command answers `--help`, and leaves everything as it was."""

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


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_answers_help(command: tuple[str, ...], tmp_path: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    path, *rest = command
    call = [sys.executable, str(ROOT / path), *(str(ROOT / part) if "/" in part else part for part in rest)]
    shown = subprocess.run(
        [*call, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    assert "usage: " in shown.stdout
    assert not list(tmp_path.iterdir())


def test_commands_take_the_memory_that_plans_count_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    configure_jax()
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == USABLE_MEMORY
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    configure_jax()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
