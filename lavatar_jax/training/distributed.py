"""Several processes that train one model: joining, taking turns, agreeing, and ending when one is lost."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from lavatar_jax.errors import UserError

PATIENCE = 7 * 24 * 3600 * 1000  # ms
_waits = itertools.count()
LOST = 3  # exit code of a process that ends because another one did


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Who trains together. Tasks of one SLURM step find each other; others need the first three options.

    A process computes on all devices that it sees; of several SLURM tasks on a machine each takes one GPU.
    `coordinator`: host:port of process 0. `join`: seconds to wait until all have come; `heartbeat`: until a
    silent process counts as lost.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    join: int = 300
    heartbeat: int = 60


def initialize(config: DistributedConfig) -> None:
    """Join the other processes, before anything is computed; a single process needs nothing.

    Raises UserError for options that do not go together, and when the others do not come.
    """
    given = (config.coordinator, config.processes, config.process_id)
    options: dict[str, Any] = {}
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError(
                "--distributed.coordinator, --distributed.processes and --distributed.process-id go together"
            )
        options = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process_id,
        }
    elif _slurm("NUM_TASKS") == 1:
        return
    if _takes_all_it_sees():  # jax would take it for one of several tasks there, and show it one GPU
        options["local_device_ids"] = []  # no choice: all
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=config.join,
            heartbeat_timeout_seconds=config.heartbeat,
            shutdown_timeout_seconds=config.heartbeat,  # a process that failed must not keep the others
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the other processes did not come together: {first_line(error)}") from None


def _slurm(name: str) -> int:
    """A number of this process's SLURM step; 1 without SLURM."""
    return int(os.environ.get(f"SLURM_STEP_{name}", "1"))


def _takes_all_it_sees() -> bool:
    """Whether this is a SLURM task with no other beside it, or SLURM shows it one GPU only (as with
    --gpus-per-task=1), and nobody said which devices it takes."""
    if "SLURM_JOB_ID" not in os.environ or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return False
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return _slurm("NUM_TASKS") <= _slurm("NUM_NODES") or (len(visible.split(",")) == 1 and visible != "")


class Agreement:
    """Numbers on which all processes must act alike: the largest of each over all of them."""

    def __init__(self, mesh: Mesh) -> None:
        self.alone = jax.process_count() == 1
        self._rows = NamedSharding(mesh, P(mesh.axis_names))  # one for each device
        self._largest = jax.jit(lambda rows: rows.max(axis=0), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, *values: float) -> Any:
        """[n] float32, on the devices: to be fetched together with the step's results, not waited for."""
        row = np.array(values, np.float32)
        if self.alone:
            return row
        local = np.tile(row, (len(self._rows.mesh.local_devices), 1))
        with jax.transfer_guard_host_to_device("allow"):  # this one is meant
            rows = jax.make_array_from_process_local_data(self._rows, local)
        return self._largest(rows)


@contextlib.contextmanager
def ending_together(step: Callable[[], int]) -> Iterator[None]:
    """If another process is lost inside, say so in one line and end this one with exit code `LOST`.

    At once and without cleaning up, since that would wait for the lost one. What waits instead of failing, as
    the devices' library may, or the end of a checkpoint, is aborted by jax for want of the other's heartbeat.
    """
    once = threading.Lock()

    def end(reason: str, code: int = LOST) -> None:
        once.acquire()  # never released: whoever comes second waits for the end
        print(
            f"error: process {jax.process_index()} ends at step {step()}: {reason}",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        for worker in multiprocessing.active_children():  # that read data: nobody else would end them
            worker.kill()
        os._exit(code)

    def end_alone(what: str) -> None:
        end(
            f"another process of this run has ended or cannot be reached ({what}). Start the same command "
            "again: it goes on from the last checkpoint"
        )

    alone = jax.process_count() == 1
    aborted = functools.partial(end_alone, "jax aborted, see above")
    lost = contextlib.nullcontext() if alone else _instead_of_aborting(aborted)
    try:
        with lost:
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        if alone:
            raise
        if is_out_of_memory(error):  # starting again would not help
            end(str(no_room(error)), code=2)
        if not isinstance(error, jax.errors.JaxRuntimeError):  # it is this process that is wrong
            traceback.print_exc()
            end(f"{type(error).__name__}, as above", code=1)
        end_alone(first_line(error))


@contextlib.contextmanager
def _instead_of_aborting(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` when a library aborts the process. Python's own handlers would never run: `abort` does not
    return to it."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: end())
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room for an array or a program."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def no_room(error: Exception) -> UserError:
    """What to do about such an error."""
    return UserError(
        f"the devices have no room for this ({first_line(error)}): see --plan; try more --train.accumulate, "
        "--mesh.fsdp or --mesh.tensor, or (transformers) --train.remat full"
    )


def first_line(error: Exception) -> str:
    """Of its message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def first_process_only(prepare: Callable[[], Any]) -> None:
    """Prepare files that all processes will read; the others wait, for hours if need be.

    `prepare` must compute on the first process's devices only. Raises what it raises; in the other processes
    UserError then.
    """
    failure: BaseException | None = None
    if jax.process_index() == 0:
        try:
            prepare()
        except BaseException as error:  # the others must not wait for ever
            failure = error
    if jax.process_count() > 1:
        # At the coordinator, not by a collective: those give up after half a minute.
        wait = multihost.get_barrier_sync_fn()
        try:
            wait(key=f"prepared {next(_waits)}", timeout_ms=PATIENCE)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"process 0, which prepares files for all, is lost ({first_line(error)})"
            ) from None
        agree = Agreement(Mesh(np.array(jax.devices()), ("device",)))
        # On every device: CPU devices that still connect to others keep a process that ends for minutes.
        failed = jax.device_get(jax.block_until_ready(agree(failure is not None)))
        if failed[0] and failure is None:
            raise UserError("process 0 could not write files for all; its own message says why")
    if failure is not None:
        raise failure
