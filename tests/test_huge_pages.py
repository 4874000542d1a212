"""A program that asks for huge pages is started anew, once, with the same command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavatar_jax.huge_pages import TRIED, TUNABLES

PROGRAM = """
import os, sys
from pathlib import Path
from lavatar_jax.huge_pages import start_with_huge_pages
print("started", os.getpid(), flush=True)
start_with_huge_pages(__file__, Path(sys.argv[1]))
print("runs", os.environ.get("GLIBC_TUNABLES"), sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("offered", "before", "starts", "after"),
    [
        ("always [madvise] never", None, 2, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=0", 2, "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, 1, None),
        ("always madvise [never]", None, 1, None),
        (None, None, 1, None),
    ],
)
def test_starts_anew_where_pages_are_offered(offered, before, starts, after, tmp_path: Path) -> None:
    offer = tmp_path / "enabled"
    if offered is not None:
        offer.write_text(offered + "\n")
    command = [written(tmp_path), str(offer), "--an", "option with spaces"]
    *started, runs = lines_of(command, before)
    assert len(started) == starts
    assert len(set(started)) == 1  # the same process: what waits for it need not know
    assert runs == f"runs {after} ['--an', 'option with spaces']"


def test_a_process_of_another_program_is_left_alone(tmp_path: Path) -> None:
    """As where a notebook runs train.py: its kernel must not start anew."""
    offer = tmp_path / "enabled"
    offer.write_text("always [madvise] never\n")
    argv, program = ["x", str(offer)], written(tmp_path)
    code = f"import runpy, sys; sys.argv = {argv!r}; runpy.run_path({program!r}, run_name='__main__')"
    assert lines_of(["-c", code], None)[1:] == ["runs None []"]


def written(folder: Path) -> str:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return str(program)


def lines_of(command: list[str], tunables: str | None) -> list[str]:
    """What a Python process prints, in an environment with these tunables."""
    environment = {name: value for name, value in os.environ.items() if name not in (TUNABLES, TRIED)}
    if tunables is not None:
        environment[TUNABLES] = tunables
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()
