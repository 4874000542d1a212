"""What a run tells: a progress bar, `log.jsonl`, TensorBoard, profiles, and `report.html`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lavatar_jax.data.skipped import SKIPPED, SkippedLog
from lavatar_jax.errors import UserError
from lavatar_jax.training.report import write_report

log = logging.getLogger(__name__)
LOG, REPORT, TENSORBOARD, PROFILE = "log.jsonl", "report.html", "tensorboard", "profile"
PROFILED = 5  # steps, where a signal asks


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """`tensorboard` needs the extra `log`; without it there is none. `profile_steps`: first and last step of
    a profile that xprof or TensorBoard shows; signal SIGUSR1 asks for one of the next steps."""

    tensorboard: bool = True
    report: bool = True
    profile_steps: tuple[int, int] | None = None


class RunLog:
    """The logs of a run in its folder; written by the first process, silent in the others."""

    def __init__(self, out: Path, config: LogConfig) -> None:
        self.out, self.config = out, config
        self.first = jax.process_index() == 0
        self._profile_until: int | None = None
        self._profile_asked = False
        columns = (
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Steps may take minutes, and some more than others: a look at half a minute would tell nothing.
        self._bar = Progress(*columns, disable=not self.first, speed_estimate_period=3600)
        self._usual_handler: Any = None
        self._task = self._bar.add_task("", total=1.0, step=0, status="compiling")
        self._board: Any = None

    def __enter__(self) -> RunLog:
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = open(self.out / LOG, "a")
            self._board = _board(self.out / TENSORBOARD) if self.config.tensorboard else None
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1"):
            self._usual_handler = signal.signal(signal.SIGUSR1, self._ask_for_profile)
        self._bar.start()
        return self

    def _ask_for_profile(self, signum: int, frame: Any) -> None:
        self._profile_asked = True

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._bar.stop()
        if self._profile_until is not None:
            jax.profiler.stop_trace()
        if self._usual_handler is not None:
            signal.signal(signal.SIGUSR1, self._usual_handler)
        if self.first:
            if skipped := self._skipped():
                self.say(
                    f"training records that could not be read: {skipped}; {self.out / SKIPPED} names them"
                )
            with self._worth_less_than_training(LOG):
                self._file.close()
            if self._board is not None:
                self._board.close()
            self.report()

    def steps(self, step: int, done: float, numbers: Mapping[str, float]) -> None:
        """Means over the latest steps: loss, rate, samples_per_second, mfu ...; records skipped so far."""
        if skipped := self._skipped():
            numbers = {**numbers, "skipped_records": skipped}
        self._write({"step": step, **numbers})
        self._scalars(step, numbers, "train")
        mfu = f"  MFU {100 * numbers['mfu']:.1f} %" if "mfu" in numbers else ""
        speed = f"  {rate:.3g} samples/s" if (rate := numbers.get("samples_per_second")) else ""
        status = f"loss {numbers['loss']:.4f}{speed}{mfu}"
        self._bar.update(self._task, completed=done, step=step, status=status)
        if not self._bar.console.is_terminal:  # a file, where a bar shows nothing before it ends
            left = self._bar.tasks[0].time_remaining
            eta = "" if left is None else f"  {datetime.timedelta(seconds=round(left))} left"
            self.say(f"step {step} ({100 * done:.1f} %)  {status}{eta}")

    def compiled(self, step: int, seconds: float, program: jax.stages.Compiled, devices: int) -> None:
        """That a program for the step after `step` was compiled, and the memory that it needs on each device:
        for its arguments (state, frozen weights, batch) and while it computes."""
        numbers: dict[str, float] = {"devices": devices, "compile_seconds": round(seconds, 1)}
        text = f"compiled in {seconds:.0f} s"
        if (sizes := program.memory_analysis()) is not None:
            numbers["arguments_gb"] = sizes.argument_size_in_bytes / 1e9
            numbers["temporary_gb"] = sizes.temp_size_in_bytes / 1e9
            text += (
                f"; on each device {numbers['arguments_gb']:.3g} GB for state, frozen weights and batch, "
                f"{numbers['temporary_gb']:.3g} GB while it computes"
            )
        self._write({"program": {"step": step, **numbers}})
        self.say(text)

    def evaluation(self, step: int, seconds: float, numbers: Mapping[str, float]) -> None:
        self._write({"evaluation": {"step": step, "seconds": round(seconds, 1), **numbers}})
        self._scalars(step, numbers, "evaluation")

    def bad_step(self, step: int, complaint: str) -> None:
        self._write({"bad_step": {"step": step, "message": complaint}})
        self.say(complaint)

    def say(self, line: str) -> None:
        """On the screen only."""
        if self.first:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def done(self, step: int) -> None:
        curves = f"; curves and samples: {self.out / REPORT}" if self.config.report else ""
        self.say(f"trained to step {step}, which is saved in {self.out}{curves}")

    def saving(self, step: int, done: float) -> None:
        self._bar.update(self._task, completed=done, step=step, status="saving")

    def profile(self, step: int) -> None:
        """Called before each step; starts and stops the profile that was asked for."""
        if self._profile_until is not None:
            if step > self._profile_until:
                jax.profiler.stop_trace()
                self._profile_until = None
                self.say(f"profile written to {self.out / PROFILE}")
            return
        start, last = self.config.profile_steps or (math.inf, -1)
        if self._profile_asked or start <= step <= last:
            self._profile_until = step + PROFILED - 1 if self._profile_asked else last
            self._profile_asked = False
            jax.profiler.start_trace(str(self.out / PROFILE))

    def report(self) -> None:
        if self.first and self.config.report:
            with self._worth_less_than_training(REPORT):
                write_report(self.out / REPORT, self.out, list(read_log(self.out / LOG)))

    def _skipped(self) -> int:
        return len(SkippedLog(self.out / SKIPPED).read()) if self.first else 0

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.first:
            with self._worth_less_than_training(LOG):
                self._file.write(json.dumps(_finite(line)) + "\n")
                self._file.flush()

    @contextlib.contextmanager
    def _worth_less_than_training(self, name: str) -> Iterator[None]:
        """What cannot be written, on a full disk say, is told."""
        try:
            yield
        except UserError as error:
            self.say(str(error))
        except OSError as error:
            self.say(f"{self.out / name} cannot be written: {error}")

    def _scalars(self, step: int, numbers: Mapping[str, float], group: str) -> None:
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{group}/{name}", value, step)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log in order. A run that went on from an older checkpoint repeats steps: the later lines
    count. A line that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    kept, repeated = [], math.inf  # the first step that a later line repeats
    for line in reversed(lines):
        if _step(line) < repeated:
            kept.append(line)
        if "step" in line:
            repeated = min(repeated, line["step"])
    yield from reversed(kept)


def _step(line: Mapping[str, Any]) -> int:
    inner = line if "step" in line else next(iter(line.values()))
    return inner["step"]


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
