"""Memory in pages of 2 MB for programs whose steps take, and give back, much of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
OFFER = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start_with_huge_pages(offer: Path = OFFER) -> None:
    """Start this program anew where that gives it huge pages. First of all: it does not return then.

    XLA takes a step's memory from the system anew for every step on CPUs, 1 GB of it in the small model's
    training. In pages of 4 kB that costs stage 1 a quarter of its time. Linux offers others to those who ask
    ("madvise"), and glibc (2.35 and later) asks only if its environment said so when the program started.
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` leaves everything as it is.
    """
    tunables = os.environ.get(TUNABLES, "")
    if HUGE_PAGES in tunables or not offer.is_file() or "[madvise]" not in offer.read_text():
        return
    os.environ[TUNABLES] = ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
