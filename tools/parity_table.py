"""Write the table of docs/parity.md: every recorded case, compared here and now.

    python tools/parity_table.py ../shared/golden/* --into docs/parity.md

Replaces what stands between the marks `<!-- table -->` and `<!-- end of table -->` of the document. Exit
code 1 if a case failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.files import write_text
from tools.check_parity import Result, find_check, run_case

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def device() -> str:
    """What computed the numbers, e.g. "cpu (AMD EPYC)" or "gpu (NVIDIA H100)"."""
    kind, cpus = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    if kind == "cpu":
        model = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
        kind = model[1] if model else platform.machine()
    return f"{jax.default_backend()} ({kind})"


def row(folder: Path, result: Result | None) -> str:
    if result is None:
        return f"| {folder.name} | | | | | not yet implemented |"
    rtol, atol = result.tolerance
    variants = ", ".join(result.variants) or "-"
    outcome = "pass" if result.passed else f"**FAIL** {result.problem}"
    numbers = f"{result.tensors} | {result.error:.1e} | rtol {rtol:g}, atol {atol:g}"
    return f"| {result.name} | {variants} | {numbers} | {outcome} |"


def table(folders: list[Path], results: list[Result | None]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    compared = [result for result in results if result is not None]
    passed = sum(result.passed for result in compared)
    return "\n".join(
        [
            f"Computed on {datetime.date.today()} on {device()} with {versions}, Python "
            f"{platform.python_version()}, in float32 with full-precision products: "
            f"{passed} of {len(compared)} compared cases passed.",
            "",
            "| case | variants | tensors | worst error | tolerance | result |",
            "|---|---|---|---|---|---|",
            *(row(folder, result) for folder, result in zip(folders, results, strict=True)),
        ]
    )


def insert(document: str, content: str) -> str:
    """The document with `content` between its marks. Raises ValueError where it has none."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"the document needs one line {BEGIN} and one line {END}")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR", help="folder with case.json")
    parser.add_argument("--into", type=Path, required=True, metavar="FILE", help="document with the marks")
    arguments = parser.parse_args()
    document = arguments.into.read_text()
    insert(document, "")  # fail before the work, not after it
    jax.config.update("jax_default_matmul_precision", "highest")
    results = [run_case(folder) if find_check(folder.name) else None for folder in arguments.cases]
    write_text(arguments.into, insert(document, table(arguments.cases, results)))
    return 0 if all(result is None or result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
