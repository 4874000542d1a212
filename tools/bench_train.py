"""Samples a second, MFU and memory of a training step of stage 1, stage 2 or the ODE stage.

    python tools/bench_train.py configs/tiny_distill.py --variant=--rollout.no-replay
    python tools/bench_train.py configs/wan1_3b_forcing.py --variant "--train.remat full" --train.batch 2

The config as it is, and each variant of it, runs as `train.py` runs it, in a process of its own, from random
weights, on records of random numbers of the size that the config is made for. It is stopped when enough steps
were timed. Options that are not listed here are train.py's, for all variants (not those that this tool needs
itself, such as --out). A run takes the devices that it would take: to compare on several, give --mesh.data.

Memory on each device: of the step's arguments (state, frozen weights, batch), what the compiler reserves
besides while it computes, and the most that was in use, where a device tells.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lavatar_jax.cli import configure_jax, parse_options, run
from lavatar_jax.files import write_text

configure_jax()  # before jax is imported

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lavatar_jax.data.negative_prompt import write_negative
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.errors import UserError
from lavatar_jax.inference.output import check_output
from lavatar_jax.training.checks import check_run
from lavatar_jax.training.diffusion_forcing import DiTRun
from lavatar_jax.training.distill import DistillRun
from lavatar_jax.training.logs import LOG, read_log
from lavatar_jax.training.subjects import sample_of
from train import load_config

WINDOW = 5  # steps that are timed together; in stage 2 at least one turn of the student
FOREVER = "1000000"
DEVICE = "import jax, json; d = jax.devices(); print(json.dumps([d[0].device_kind, len(d), jax.__version__]))"


def read_run(config: str, options: Sequence[str]) -> Any:
    """The run that train.py would have. Raises UserError, also for stages that train on no records."""
    default = load_config(config)
    found = parse_options(type(default), options, prog=f"train.py {config}", default=default)
    if not isinstance(found, DiTRun | DistillRun):
        raise UserError(f"{config}: only stage 1, stage 2 and the ODE stage can be measured")
    check_run(found)
    return found


def write_records(run: Any, folder: Path) -> None:
    """A batch of records of random numbers, of the size that `run` is made for."""
    random, channels = np.random.default_rng(0), run.model.latent_channels
    shapes = {name: leaf.shape[1:] for name, leaf in sample_of(run).items()}
    record: dict[str, Any] = {
        name: random.normal(size=shape).astype(np.float16) for name, shape in shapes.items()
    }
    record["audio"] = record["audio"][0]
    record["mouth"] = np.full(shapes["mouth"], 255, np.uint8)
    negative = record.pop("negative_text", None)
    record |= {"caption": "", "spread": np.ones(channels, np.float16)}
    with ShardWriter(folder) as writer:
        for number in range(run.train.batch):
            writer.write({"id": str(number), **record})
        writer.flush()
        writer.finish(mean=np.zeros(channels), std=np.ones(channels), encoder={"source": "random numbers"})
    if negative is not None:
        write_negative(folder, "", negative)


def window_of(run: Any) -> int:
    turns = run.distill.update_ratio if type(run) is DistillRun else 1
    return -(-WINDOW // turns) * turns


def training_options(run: Any, folder: Path) -> list[str]:
    """What makes train.py run from random weights on the records in `folder`, and write only its log."""
    options = ["--init", "None", "--data.folder", str(folder / "records"), "--data.clips", "0"]
    options += ["--out", str(folder / "run"), "--samples.records", "0", "--log.no-tensorboard"]
    options += ["--log.no-report", "--train.log-every", str(window_of(run)), "--train.steps", FOREVER]
    options += ["--train.checkpoint-seconds", FOREVER]
    if run.lora.rank:
        options += ["--lora.init", "None"]
    if isinstance(run, DistillRun):
        options += ["--teacher", "None"]
    if type(run) is DistillRun:
        options += ["--distill.critic-warmup", "0"]  # the student learns from the beginning
    return options


@contextlib.contextmanager
def started(command: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose words go to a file; killed in the end."""
    with open(output, "wb") as words:
        process = subprocess.Popen(
            command,
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},  # to time the compiler too
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that read its data
            process.wait()


def last_words(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no word")


def measure(config: str, options: list[str], windows: int) -> dict[str, Any]:
    """One variant: train until so many windows of steps were timed, or it ends by itself (`failed`)."""
    run = read_run(config, options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(run, folder / "records")
        command = [sys.executable, str(ROOT / "train.py"), config, *options, *training_options(run, folder)]
        output, log = folder / "output", folder / "run" / LOG
        with started(command, output) as process:
            timed: list[dict[str, Any]] = []
            while len(timed) <= windows and process.poll() is None:
                time.sleep(0.2)
                lines = list(read_log(log))
                timed = [line for line in lines if "samples_per_second" in line]
            code = process.poll()
        if code is not None:
            return {"failed": f"exit code {code}: {last_words(output)}"}
        program = next(line["program"] for line in lines if "program" in line)
        timed = timed[1 : windows + 1]  # in the first one programs and caches were still warming up
    rates = [line["samples_per_second"] for line in timed]
    mean = harmonic_mean(rates)  # windows have equally many samples
    row = {
        "step_ms": 1e3 * run.train.batch / mean,
        "samples_per_second": mean,
        "slowest": min(rates),
        "fastest": max(rates),
        **{name: value for name, value in program.items() if name != "step"},
    }
    if "mfu" in timed[-1]:
        row["mfu"] = harmonic_mean([line["mfu"] for line in timed])
    if "peak_gb" in timed[-1]:
        row["peak_gb"] = timed[-1]["peak_gb"]
    return row


COLUMNS = {
    "devices": ("devices", "{}"),
    "step_ms": ("ms a step", "{:.1f}"),
    "samples_per_second": ("samples/s", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "arguments_gb": ("arguments GB", "{:.3g}"),
    "temporary_gb": ("temporary GB", "{:.3g}"),
    "peak_gb": ("peak GB", "{:.3g}"),
    "compile_seconds": ("compiled in s", "{:.0f}"),
}


def show(results: dict[str, dict[str, Any]], title: str) -> None:
    table = Table("variant", *(head for head, _ in COLUMNS.values()), title=title)
    for name, row in results.items():
        cells = (form.format(row[key]) if key in row else "-" for key, (_, form) in COLUMNS.items())
        table.add_row(name or "as configured", *cells)
    console = Console(width=160)
    console.print(table)
    for name, row in results.items():
        if "failed" in row:
            console.print(f"{name or 'as configured'}: {row['failed']}", highlight=False, markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="one of configs/*.py")
    parser.add_argument("--variant", action="append", default=[], help="options of train.py, in one string")
    parser.add_argument("--windows", type=int, default=4, help=f"that are timed, of {WINDOW} steps or more")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options, common = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending what was started
    jax.config.update("jax_platforms", "cpu")  # this process leaves the devices to those that it starts
    if options.json:
        check_output(options.json, ".json")
    if options.windows < 1:
        raise UserError(f"--windows {options.windows}: at least one must be timed")
    variants = {text: [*common, *shlex.split(text)] for text in ("", *options.variant)}
    for words in variants.values():  # before any of them takes minutes
        read_run(options.config, words)
    found = json.loads(subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, check=True).stdout)
    kind, count, version = found
    about = {
        "device": kind,
        "devices": count,
        "jax": version,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tools/bench_train.py", *sys.argv[1:]]),
    }
    results: dict[str, dict[str, Any]] = {}
    for text, words in variants.items():
        print(f"{text or 'as configured'} ...", file=sys.stderr, flush=True)
        results[text] = measure(options.config, words, options.windows)
        if options.json:
            write_text(options.json, json.dumps({**about, "results": results}, indent=1) + "\n")
    show(results, f"{options.config} on {count} x {kind}, jax {version}, {about['date']}")
    return 0 if any("failed" not in row for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(run(main))
