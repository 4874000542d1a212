"""How processes find each other, and which devices they take: two real ones, as in a SLURM step."""

import os
import socket
import subprocess
import sys

import pytest

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


def test_tasks_that_share_a_machine_take_a_gpu_each() -> None:
    assert ask_two_tasks(nodes=1) == ["0 of 2 sees 0", "1 of 2 sees 1"]
