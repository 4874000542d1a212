"""Memory in pages of 2 MB for programs whose steps take, and give back, much of it."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
OFFER = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TRIED = "LAVATAR_JAX_STARTED_ANEW"


def start_with_huge_pages(program: str, offer: Path = OFFER) -> None:
    """Start `program`, the file that calls this, anew where that gives it huge pages; before jax is imported.

    XLA takes a step's memory from the system anew for every step on CPUs, 1 GB of it in the small model's
    training. In pages of 4 kB that costs stage 1 a quarter of its time. Linux offers others to those who ask
    ("madvise"), and glibc (2.35 and later) asks only if its environment said so when the program started.
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` leaves everything as it is; so does a process that is not this
    program's own, such as a notebook's.
    """
    with contextlib.suppress(OSError):
        tunables = os.environ.get(TUNABLES, "")
        if TRIED in os.environ or HUGE_PAGES in tunables or "[madvise]" not in offer.read_text():
            return
        if not any(Path(word).resolve() == Path(program).resolve() for word in sys.orig_argv[1:]):
            return
        os.environ[TUNABLES] = ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))
        os.environ[TRIED] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
