"""How processes find each other, and which devices they take: two real ones, as in a SLURM step."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from lavatar_jax import cli
from lavatar_jax.checkpoints.runs import CheckpointConfig
from lavatar_jax.errors import UserError
from lavatar_jax.training import stages
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.run import Run
from tests.training.finished_run import write_run

SCRIPT = """
import sys
from lavatar_jax.training.distributed import DistributedConfig, initialize
address, process = sys.argv[1:]
explicit = dict(coordinator=address, processes=2, process_id=int(process)) if address else {}
initialize(DistributedConfig(heartbeat=10, **explicit))
import jax
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
print(f"{jax.process_index()} of {jax.process_count()} sees {CUDA_VISIBLE_DEVICES.value}")
"""
ROOT = Path(__file__).parents[2]
FIRST_PORT = 65536 - 4096  # of those that jax takes the one from that the job's number says


def free_port() -> int:
    for port in range(FIRST_PORT, FIRST_PORT + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def ask_two_tasks(*, nodes: int, explicit: bool = False) -> list[str]:
    """What two processes say that believe to be a SLURM step on so many machines."""
    port, tasks = free_port(), []
    for process in range(2):
        slurm = {
            "SLURM_JOB_ID": str(port - FIRST_PORT),
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(process),
            "SLURM_LOCALID": str(process % (2 // nodes)),
        }
        address = f"127.0.0.1:{port}" if explicit else ""
        tasks.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, address, str(process)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **slurm},
            )
        )
    said = []
    for task in tasks:
        out, error = task.communicate(timeout=240)
        assert task.returncode == 0, error[-2000:]
        said.append(out.strip())
    return said


@pytest.mark.parametrize("explicit", [False, True])
def test_a_task_that_has_a_machine_for_itself_takes_all_of_its_gpus(explicit: bool) -> None:
    assert ask_two_tasks(nodes=2, explicit=explicit) == ["0 of 2 sees all", "1 of 2 sees all"]


def test_tasks_that_are_shown_one_gpu_each_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by --gpus-per-task=1: jax would look for the second one in the second task."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert ask_two_tasks(nodes=1) == ["0 of 2 sees all", "1 of 2 sees all"]


def test_programs_of_several_processes_are_kept_where_all_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: told.append(setting))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli.configure_jax()
    cli.share_compiled(tmp_path)
    assert told == [("jax_compilation_cache_dir", str(tmp_path / "compiled"))]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somebody/said/so")
    cli.configure_jax()
    cli.share_compiled(tmp_path)
    assert len(told) == 1


def test_a_device_without_room_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(config: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 91 GB\nmore lines")

    monkeypatch.setattr(stages, "train", explode)
    arguments = [str(ROOT / "configs" / "tiny_vae.py"), "--out", str(tmp_path)]
    with pytest.raises(
        UserError, match=r"no room for this \(RESOURCE_EXHAUSTED.* 91 GB\): see --plan; try more"
    ):
        train.main(arguments)


def test_tasks_that_share_a_machine_take_a_gpu_each() -> None:
    assert ask_two_tasks(nodes=1) == ["0 of 2 sees 0", "1 of 2 sees 1"]


PREPARING = """
import sys
from pathlib import Path
address, process, run, wrong = sys.argv[1:]
from lavatar_jax.training.distributed import DistributedConfig, first_process_only, initialize
initialize(DistributedConfig(coordinator=address, processes=2, process_id=int(process), heartbeat=10))
from lavatar_jax.checkpoints.runs import read_average, result_step
from lavatar_jax.cli import run as exit_code
from lavatar_jax.errors import UserError

def prepare():
    if wrong:
        raise UserError(wrong)
    print("prepared with", result_step(Path(run)), read_average(Path(run))["weight"].tolist())

def main():
    for _ in range(2):
        first_process_only(prepare)
    read_average(Path(run))
    print("reads too")

sys.exit(exit_code(main))
"""


def prepare_in_two(run: Path, wrong: str = "") -> list[tuple[int, str, str]]:
    """Exit codes and what two processes say, of which the first prepares something from a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARING, address, str(process), str(run), wrong],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(2)
    ]
    said = [task.communicate(timeout=240) for task in tasks]
    return [(task.returncode, *words) for task, words in zip(tasks, said, strict=True)]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run that keeps its best checkpoint."""
    config = Run(
        out=str(tmp_path / "run"), train=LoopConfig(steps=1), checkpoint=CheckpointConfig(best="score")
    )
    return write_run(config, {"weight": np.ones(2, np.float32)}, step=3, metrics={"score": 1.0})


def test_the_first_process_reads_a_run_while_the_others_wait(finished: Path) -> None:
    (code, out, error), (other_code, other_out, other_error) = prepare_in_two(finished)
    assert (code, other_code) == (0, 0), error + other_error
    assert [text.count("prepared with 3 [1.0, 1.0]") for text in (out, other_out)] == [2, 0]
    assert [text.count("reads too") for text in (out, other_out)] == [1, 1]


def test_nobody_waits_for_a_preparation_that_failed(finished: Path) -> None:
    (code, out, error), (other_code, other_out, other_error) = prepare_in_two(finished, "no speech")
    assert (code, other_code) == (2, 2), error + other_error
    assert "reads too" not in out + other_out
    assert "error: no speech\n" in error
    assert "error: process 0 could not write files for all; its own message says why\n" in other_error
