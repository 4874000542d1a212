"""What the host knows of a training run: how far it is, what its steps said, whether to stop or to save."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.devices import find_gpu
from lavatar_jax.models.dit import Remat
from lavatar_jax.training.bad_steps import BadSteps, Policy
from lavatar_jax.training.logs import RunLog
from lavatar_jax.training.precision import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast. With `steps` set the schedule counts steps and a run is exactly repeatable;
    otherwise it counts `seconds` of training, which suits a shared machine."""

    seconds: float = 1800.0
    steps: int | None = None
    learning_rate: float = 2e-3  # peak
    warmup: float = 0.03  # part of the run
    weight_decay: float = 0.0
    ema_decay: float = 0.99
    batch: int = 8  # samples of a step, on all devices together
    accumulate: int = 1  # parts in which a batch is computed, one after the other
    precision: Precision = "float32"  # of the computation; what is trained is kept in float32
    remat: Remat = "none"  # what the transformer's layers compute anew in the backward pass; `models.dit`
    workers: int = 0  # processes that read data
    seed: int = 0
    log_every: int = 20  # steps
    checkpoint_seconds: float = 180.0
    on_bad_step: Policy = "skip"  # loss or gradient not finite, or a spike; `bad_steps`
    spike: float = 20.0  # a loss that many times the usual one is a spike; 0: none is

    def progress(self, step: int, seconds: float) -> float:
        return step / self.steps if self.steps is not None else seconds / self.seconds


class Stopwatch:
    """Seconds of training: without compilation, checkpoints and evaluations."""

    def __init__(self, seconds: float) -> None:
        self._before = seconds
        self._start: float | None = None

    def read(self) -> float:
        return self._before + (0.0 if self._start is None else time.perf_counter() - self._start)

    def run(self) -> None:
        self._start = time.perf_counter() if self._start is None else self._start

    def pause(self) -> None:
        self._before, self._start = self.read(), None


@dataclasses.dataclass
class Flight:
    """A step that the devices may still be computing, and what the host must know when it has landed."""

    step: int
    rate: float
    metrics: dict[str, Any]
    agreed: Any  # [2]: whether to stop, seconds
    samples: int  # of all processes
    records: Any  # of this process's samples, or None


class Bookkeeping:
    """Alike in all processes, except for the times that the first one logs."""

    log: RunLog

    def __init__(
        self,
        config: LoopConfig,
        step: int,
        seconds: float,
        flops: float | None,
        mesh: Mesh,
    ) -> None:
        self.config, self.step, self.seconds = config, step, seconds
        self.watch, self.bad = Stopwatch(seconds), BadSteps(config.on_bad_step)
        self.stopping, self._saved = False, seconds
        self.failure: UserError | None = None  # to raise when all is saved
        self._window: list[dict[str, Any]] = []
        self._times: list[float] = []  # that steps took
        self._samples: list[int] = []  # in those steps
        self._landed: float | None = None
        self._compiled = False
        self._device = mesh.local_devices[0]
        gpu = find_gpu(mesh.devices.flat[0].device_kind)
        self._flops = flops / (gpu.bf16 * 1e12 * mesh.size) if gpu is not None and flops else None

    @property
    def done(self) -> float:
        return self.config.progress(self.step, self.seconds)

    @property
    def checkpoint_due(self) -> bool:
        return self.seconds - self._saved >= self.config.checkpoint_seconds

    def saved(self) -> None:
        self._saved = self.seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What takes time and is no training."""
        self.watch.pause()
        self._landed = None
        yield
        if self._compiled:  # else the next step does
            self.watch.run()
            self._landed = time.perf_counter()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """A pause while a step may still be on its way, which is not timed then."""
        with self.paused():
            yield
        self._landed = None

    def land(self, flight: Flight) -> None:
        """Wait for a step, and take in what it says."""
        metrics, agreed = jax.device_get((flight.metrics, flight.agreed))
        now = time.perf_counter()
        if self._landed is not None:
            self._times.append(now - self._landed)
            self._samples.append(flight.samples)
        self._landed, self._compiled = now, True
        self.watch.run()  # from the first step on: its compilation is not training
        self.stopping, self.seconds = self.stopping or bool(agreed[0]), float(agreed[1])
        if (complaint := self._judge(flight, metrics)) is not None:
            self.log.bad_step(flight.step, complaint)
            if self.bad.should_stop() and self.failure is None:
                self.stopping, self.failure = True, self.bad.error(complaint)
        else:
            self._window.append(metrics)
        if flight.step % self.config.log_every == 0 and self._window:
            done = self.config.progress(flight.step, self.seconds)
            self.log.steps(flight.step, done, self._summary(flight.rate))
            self._window, self._times, self._samples = [], [], []

    def _judge(self, flight: Flight, metrics: dict[str, Any]) -> str | None:
        records = flight.records
        bad = bool(metrics.get("bad", 0)) or not np.isfinite(metrics["loss"])
        if bad and records is not None and jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                # Once each: processes may have shared samples.
                records = np.unique(np.asarray(multihost_utils.process_allgather(records)))
        return self.bad.check(flight.step, metrics, records)

    def _summary(self, rate: float) -> dict[str, float]:
        """Means over the last steps: metrics, throughput, and the most memory that was in use so far.

        Not medians: of five steps in stage 2 the one that teaches the student takes longest.
        """
        window = self._window
        means = {name: float(np.mean([metrics[name] for metrics in window])) for name in window[0]}
        numbers = {"seconds": round(self.seconds, 1), "rate": rate, **means}
        if self._times:
            numbers["samples_per_second"] = sum(self._samples) / sum(self._times)
            if self._flops is not None:
                numbers["mfu"] = self._flops * len(self._times) / sum(self._times)
        if peak := (self._device.memory_stats() or {}).get("peak_bytes_in_use"):  # a CPU does not tell
            numbers["peak_gb"] = peak / 1e9
        return numbers
