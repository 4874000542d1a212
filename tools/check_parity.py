"""Compare this project with recorded cases of the PyTorch reference.

    python tools/check_parity.py CASE_DIR... [-v]

One line per case: PASS or FAIL, name, worst absolute error, and the tolerance at that tensor; last
"N passed, M failed". Exit code 0 only if every case is known and passed. -v also lists every tensor.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.parity import forwards, parts, sampling, vae
from tools.parity.case import Case, Check

CHECKS: dict[str, Callable[[Case], Iterator[Check]]] = {
    "01": parts.rope,
    "02": parts.embeddings,
    "03": parts.audio_encoder,
    "04": parts.motion_packer,
    "05": parts.block,
    "06a": forwards.stream,
    "06a2": forwards.stream,
    "06b": forwards.stream,
    "06c": forwards.stream,
    "06d": forwards.train,
    "06e": parts.actor_masks,
    "06f": forwards.late_clip,
    "07": forwards.teacher,
    "08a": sampling.single_gpu,
    "08b": sampling.tpp,
    "08c": sampling.euler,
    "09": lambda case: (Check(name, got, want, (r, a)) for name, got, want, r, a in vae.check(case.folder)),
    "12": sampling.image_size,
}


def excess(check: Check) -> tuple[float, float]:
    """(error over tolerance: at most 1 passes, worst absolute error); wrong shapes and NaN are infinite."""
    got, want = np.asarray(check.got, np.float64), np.asarray(check.want, np.float64)
    if got.shape != want.shape:
        return np.inf, np.inf
    error = np.abs(got - want)
    if not np.isfinite(error).all():
        return np.inf, np.inf
    rtol, atol = check.tolerance
    allowed = atol + rtol * np.abs(want)
    ratio = np.where(error > 0, error / np.maximum(allowed, np.finfo(np.float64).tiny), 0.0)
    return float(ratio.max(initial=0.0)), float(error.max(initial=0.0))


def run_case(folder: Path, verbose: bool) -> bool:
    """Print the case's line; True if it passed."""
    try:
        case = Case(folder)
    except (OSError, ValueError) as error:
        print(f"FAIL {folder.name} unreadable: {error}")
        return False
    match = re.match(r"\d+[a-z]?\d?", case.name)
    check_case = CHECKS.get(match[0]) if match else None
    if check_case is None:
        print(f"FAIL {case.name} unknown case, no check is written for it")
        return False
    worst, worst_error, tolerance, count = -1.0, 0.0, (0.0, 0.0), 0
    try:
        for check in check_case(case):
            ratio, difference = excess(check)
            count += 1
            if verbose:
                print(f"  {'ok  ' if ratio <= 1 else 'FAIL'} {check.name} {difference:.2e}")
            if ratio > worst:
                worst, worst_error, tolerance = ratio, difference, check.tolerance
    except Exception as error:
        print(f"FAIL {case.name} {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return False
    passed = count > 0 and worst <= 1
    rtol, atol = tolerance
    print(
        f"{'PASS' if passed else 'FAIL'} {case.name} {worst_error:.2e} rtol={rtol:g},atol={atol:g}",
        flush=True,
    )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR", help="folder with case.json")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every tensor")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    results = [run_case(folder, arguments.verbose) for folder in arguments.cases]
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
