"""A program that asks for huge pages is started anew, once, with the same command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from pathlib import Path
from lavatar_jax.huge_pages import start_with_huge_pages
print("started", os.getpid(), flush=True)
start_with_huge_pages(Path(sys.argv[1]))
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
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if before is not None:
        environment["GLIBC_TUNABLES"] = before
    command = [sys.executable, "-c", PROGRAM, str(offer), "--an", "option with spaces"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    *started, runs = done.stdout.splitlines()
    assert len(started) == starts
    assert len(set(started)) == 1  # the same process: what waits for it need not know
    assert runs == f"runs {after} ['--an', 'option with spaces']"
