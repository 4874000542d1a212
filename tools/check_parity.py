"""Compare this project with recorded cases of the PyTorch reference.

    python tools/check_parity.py CASE_DIR... [-v]

One line per case: PASS or FAIL, name, worst absolute error, and the tolerance at that tensor; last
"N passed, M failed". A case passes only if every output that its case.json names or its files hold was
compared. Exit code 0 only if every case is known and passed. -v also lists every tensor.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Case 08b runs on a pipeline of five devices; on the CPU they are virtual. Must be asked for before jax.
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=5"

import jax
import numpy as np
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.parity import adapters, distillation, forwards, parts, sampling, speech, text, vae
from tools.parity.case import EXACT, Case, Check, Tolerance

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
    "10": text.umt5,
    "11": speech.wav2vec2,
    "12": sampling.image_size,
    "13": adapters.lora,
    "14": adapters.fp8,
    "15a": distillation.losses,
    "15b": distillation.rollout,
}


def excess(check: Check) -> tuple[float, float]:
    """(error over tolerance: at most 1 passes, worst absolute error).

    Both are infinite where shapes differ or a number is not finite.
    """
    got, want = np.asarray(check.got, np.float64), np.asarray(check.want, np.float64)
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return np.inf, np.inf
    error = np.abs(got - want)
    rtol, atol = check.tolerance
    allowed = atol + rtol * np.abs(want)
    ratio = np.where(error > 0, error / np.maximum(allowed, np.finfo(np.float64).tiny), 0.0)
    return float(ratio.max(initial=0.0)), float(error.max(initial=0.0))


class Result(NamedTuple):
    """How one case went. `error` and `tolerance` are those of the tensor that came closest to failing.

    `problem` says why there was nothing to compare, or what was not.
    """

    name: str
    passed: bool
    error: float = np.inf
    tolerance: Tolerance = EXACT
    tensors: int = 0
    variants: tuple[str, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        rtol, atol = self.tolerance
        numbers = f"{self.error:.2e} rtol={rtol:g},atol={atol:g}"
        return f"{'PASS' if self.passed else 'FAIL'} {self.name} {numbers} {self.problem}".rstrip()


def find_check(name: str) -> Callable[[Case], Iterator[Check]] | None:
    """The comparison of a case by the number in its name; None where none is written."""
    number = re.match(r"\d+[a-z]?\d?", name)
    return CHECKS.get(number[0]) if number else None


def run_case(folder: Path, verbose: bool = False) -> Result:
    """Compare all tensors of a case; prints its line, with `verbose` a line for each tensor before it."""
    result = _compare(folder, verbose)
    print(result, flush=True)
    return result


def _compare(folder: Path, verbose: bool) -> Result:
    try:
        case = Case(folder)
        left = case.recorded()
    except (OSError, ValueError, SafetensorError) as reason:
        return Result(folder.name, passed=False, problem=f"unreadable: {_line(reason)}")
    except Exception as reason:
        return Result(folder.name, passed=False, problem=f"case.json is of another form: {_line(reason)}")
    check_case = find_check(case.name)
    if check_case is None:
        return Result(case.name, passed=False, problem="unknown case, no check is written for it")
    worst, worst_error, tolerance, count = -1.0, 0.0, EXACT, 0
    try:
        for check in check_case(case):
            ratio, error = excess(check)
            count += 1
            if verbose:
                print(f"  {'ok  ' if ratio <= 1 else 'FAIL'} {check} {error:.2e}")
            left.discard((check.variant, check.name))
            if ratio > worst:
                worst, worst_error, tolerance = ratio, error, check.tolerance
    except Exception as reason:
        return Result(case.name, passed=False, problem=f"{type(reason).__name__}: {_line(reason)}")
    result = Result(case.name, count > 0 and worst <= 1, worst_error, tolerance, count, case.variants)
    if left:
        names = ", ".join(name + f" ({variant})" * bool(variant) for variant, name in sorted(left))
        return result._replace(passed=False, problem=f"not compared: {names}")
    return result


def _line(reason: Exception) -> str:
    return (str(reason).splitlines() or [""])[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR", help="folder with case.json")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every tensor")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    passed = [run_case(folder, arguments.verbose).passed for folder in arguments.cases]
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
