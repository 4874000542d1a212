"""Runs in processes of their own that are killed, interrupted, and spread over two processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.checkpoints.runs import RunCheckpoints
from lavatar_jax.training.distributed import LOST
from tests.training.toy_run import losses

STEPS = 6
LIMIT = 240  # seconds for anything here


def start(out: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("toy.py")), str(out), str(STEPS)]
    return subprocess.Popen(
        [*command, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == f"step {step}":
            return
    raise AssertionError(f"it ended before step {step}: {process.communicate()[1][-2000:]}")


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        out, error = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, error = process.communicate()
    assert process.returncode == code, error[-3000:]
    return out + error


def arrays(out: Path) -> dict[str, np.ndarray]:
    checkpoints = RunCheckpoints(out / "checkpoints")
    found = {name: np.asarray(value) for name, value in checkpoints.read(STEPS).items()}
    checkpoints.close()
    del found[".seconds"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(out))
    assert len(losses(out)) == STEPS
    return out


def test_a_killed_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path):
    process = start(tmp_path, "--slow", 0.3)
    wait_for_step(process, 4)
    process.kill()
    process.communicate()
    assert len(losses(tmp_path)) < STEPS
    finish(start(tmp_path))
    assert losses(tmp_path) == losses(whole)
    expected, found = arrays(whole), arrays(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name], err_msg=name)


def test_sigterm_saves_and_ends_so_that_nothing_goes_on_without_it(whole: Path, tmp_path: Path):
    process = start(tmp_path, "--slow", 0.3)
    wait_for_step(process, 2)
    process.send_signal(signal.SIGTERM)
    said = finish(process, 130)
    stopped = len(losses(tmp_path))
    assert 2 <= stopped < STEPS
    assert f"stopped at step {stopped}, which is saved" in said
    assert "done" not in said
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    assert checkpoints.manager.latest_step() == stopped
    checkpoints.close()


def pair(
    out: Path, *options: object, devices: int = 2, mesh: tuple[int, int, int] = (2, 2, 1)
) -> list[subprocess.Popen[str]]:
    """Two processes with so many devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    group = ("--coordinator", address, "--processes", 2)
    common = ("--devices", devices, "--mesh", *mesh, *group, *options)
    return [start(out, *common, "--id", index) for index in range(2)]


def test_two_processes_that_share_samples_equal_one(whole: Path, tmp_path: Path):
    for process in pair(tmp_path, devices=1, mesh=(1, 1, 2)):
        assert "done" in finish(process)
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


def test_when_one_process_is_killed_the_other_says_so_and_the_run_goes_on(whole: Path, tmp_path: Path):
    first, second = pair(tmp_path, "--slow", 0.3)
    wait_for_step(first, 3)
    second.kill()
    second.communicate()
    killed = time.monotonic()
    _, error = first.communicate(timeout=LIMIT)
    assert time.monotonic() - killed < 90
    assert first.returncode != 0
    messages = [line for line in error.splitlines() if re.match(r"error: process 0 ends at step \d", line)]
    assert len(messages) == 1, error[-3000:]
    assert "Start the same command again" in messages[0]
    for process in pair(tmp_path):
        finish(process)
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


def test_a_signal_to_one_process_saves_and_ends_all_at_the_same_step(tmp_path: Path):
    first, second = pair(tmp_path, "--slow", 0.3)
    wait_for_step(first, 2)
    second.send_signal(signal.SIGTERM)
    said = finish(first, 130)
    finish(second, 130)
    assert f"stopped at step {len(losses(tmp_path))}, which is saved" in said


def test_a_process_that_is_aborted_for_the_loss_of_another_says_so(tmp_path: Path):
    """As jax does where nothing fails by itself; the thread that aborts is not the one that waits."""
    script = """
import os, threading, jax
from lavatar_jax.training.distributed import ending_together
jax.process_count, jax.process_index = lambda: 2, lambda: 0
with ending_together(lambda: 7):
    threading.Timer(0.1, os.abort).start()
    threading.Event().wait(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == LOST, done.stderr
    (message,) = done.stderr.splitlines()
    assert message.startswith("error: process 0 ends at step 7: another process of this run has ended")
    assert "Start the same command again" in message
