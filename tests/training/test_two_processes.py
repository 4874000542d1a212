"""The command itself in two processes: adapters on a frozen base, records from a folder, some held out."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.checkpoints.runs import result_step
from lavatar_jax.training import diffusion_forcing
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig, train_dit
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.logs import LOG, read_log
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.weights import LoraConfig
from tests.training.test_distill import MODEL, make_run

ROOT = Path(__file__).parents[2]
CONFIG_FILE = """
from pathlib import Path
from tests.training.test_two_processes import forcing_run

def get_config():
    return forcing_run(Path({folder!r}))
"""


def forcing_run(folder: Path) -> DiTRun:
    """Of stage 1, on the records and weights that `make_run` leaves in `folder`."""
    return DiTRun(
        out=str(folder / "out"),
        init=str(folder / "model"),
        model=MODEL,
        data=LatentsConfig(folder=str(folder / "latents"), clips=0, text_len=3, text_dim=4),
        loss=ForcingConfig(),
        lora=LoraConfig(rank=2, base="float32"),
        samples=SamplesConfig(records=2),
        optim=OptimConfig(kind="adamw"),
        train=LoopConfig(steps=3, learning_rate=1e-2, batch=4, log_every=1),
    )


def logged(out: Path) -> list[dict[str, float]]:
    """Losses of the steps, and what was measured in the end."""
    lines = list(read_log(out / LOG))
    steps = [{"loss": line["loss"], "grad_norm": line["grad_norm"]} for line in lines if "step" in line]
    return [*steps, [line["evaluation"] for line in lines if "evaluation" in line][-1]]


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    monkeypatch.setattr(diffusion_forcing, "make_sampler", lambda *arguments: None)  # there is no VAE
    alone = dataclasses.replace(forcing_run(tmp_path), out=str(tmp_path / "alone"))
    train_dit(alone)

    config = tmp_path / "config.py"
    config.write_text(CONFIG_FILE.format(folder=str(tmp_path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    command = [sys.executable, "train.py", str(config), "--mesh.data", "2", "--mesh.fsdp", "2"]
    command += ["--distributed.coordinator", address, "--distributed.processes", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--distributed.process-id", str(index)],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "".join(said)[-3000:]
    assert "with several processes the report shows no samples" in said[0]
    assert result_step(tmp_path / "out") == 3
    found, expected = logged(tmp_path / "out"), logged(tmp_path / "alone")
    assert len(found) == len(expected) == 4
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name in other.keys() - {"seconds"}:
            # Adam makes whole steps of gradients that are almost nothing, and so of rounding.
            np.testing.assert_allclose(one[name], other[name], rtol=2e-3 if number else 1e-5, err_msg=name)
