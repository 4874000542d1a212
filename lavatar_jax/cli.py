"""What the command lines share: parsing into dataclasses, and one line on stderr for what a user did wrong.

Exit codes: 0 done, 2 wrong input (one line says what), 3 another process of a training is lost, 130
interrupted.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.extras import subcommand_cli_from_dict

from lavatar_jax.errors import UserError

Options = TypeVar("Options")


def parse(
    commands: Mapping[str, Callable[..., Any]], args: Sequence[str], *, prog: str, description: str
) -> Any:
    """Builds the dataclass of the command that `args` name, e.g. `["generate", "--steps", "4"]`.

    Raises UserError for unknown commands, options and values; SystemExit(0) after `--help`.
    """
    return _parse(
        lambda: subcommand_cli_from_dict(dict(commands), prog=prog, description=description, args=args), prog
    )


def parse_options(
    options: type[Options],
    args: Sequence[str],
    *,
    prog: str,
    default: Any = None,
    description: str | None = None,
) -> Options:
    """Builds the dataclass of a program without subcommands. Raises as `parse` does."""
    return _parse(
        lambda: tyro.cli(options, prog=prog, args=args, default=default, description=description), prog
    )


def _parse(read: Callable[[], Options], prog: str) -> Options:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return read()
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_one_line(complaint.getvalue())} (see {prog} --help)") from None


def run(main: Callable[[], int | None]) -> int:
    """Calls `main` and returns the exit code: its own, or that of what went wrong."""
    try:
        code = main()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code or 0


def _home_cache() -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lavatar_jax" / "xla")


def share_compiled(folder: Path) -> None:
    """Keep what several processes compile in `folder`, which all of them see, unless the environment says
    where. In homes of their own only the first process would find its programs again, and the others, while
    they compile, would wait for what it has no need to work out."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") == _home_cache():
        jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").absolute()))


def configure_jax() -> None:
    """Lets jax keep compiled programs on disk, for faster starts, and take as much of a GPU's memory as plans
    count on (by itself it takes 0.75); to be called before jax is imported. The environment goes first."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _home_cache())
    # Small programs too: there are many, and a second start should wait for none of them.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # evaluation.devices.USABLE_MEMORY


def _one_line(box: str) -> str:
    """The message of tyro's framed error: its first part, and the option it suggests, if any."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    parts = [part.split("\n") for part in re.split(r"\n?─+\n?", "\n".join(lines))]
    message = " ".join(parts[0]).rstrip(".")
    for part in parts[1:]:
        if part[0].startswith(("Perhaps you meant", "Available subcommands")):
            message += f". {' '.join(part[:2])}"
    return message or " ".join(box.split())
