"""The command itself in two processes: adapters on a frozen base, records from a folder, some held out."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import nnx
from PIL import Image

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.runs import result_step
from lavatar_jax.config import VAEConfig
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.models.vae import make_vae
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig, train_dit
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.logs import LOG, read_log
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.report import SAMPLES
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.vae import VAELossConfig, VAERun
from lavatar_jax.training.weights import LoraConfig
from tests.training.finished_run import write_run
from tests.training.test_distill import MODEL, make_run

VAE = VAEConfig(
    kind="wan22", width=4, multipliers=(1, 1, 1), res_blocks=1, temporal_downsample=(True, True), patch=2,
    latent_channels=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4,
)  # fmt: skip
ROOT = Path(__file__).parents[2]
CONFIG_FILE = """
from pathlib import Path
from tests.training.test_two_processes import forcing_run

def get_config():
    return forcing_run(Path({folder!r}))
"""


def forcing_run(folder: Path) -> DiTRun:
    """Of stage 1, on what `make_run` leaves in `folder`, and the VAE there."""
    return DiTRun(
        out=str(folder / "out"),
        init=str(folder / "model"),
        model=MODEL,
        data=LatentsConfig(
            folder=str(folder / "latents"), vae=str(folder / "vae"), clips=0, text_len=3, text_dim=4
        ),
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


def shown(out: Path) -> dict[str, np.ndarray]:
    """The last pictures of the samples of the last step."""
    pictures = {}
    for path in sorted((out / SAMPLES / "00000003").iterdir()):
        with Image.open(path) as picture:
            picture.seek(picture.n_frames - 1)
            pictures[path.name] = np.asarray(picture.convert("RGB"), np.float32)
    return pictures


def test_two_processes_equal_one(tmp_path: Path) -> None:
    make_run(tmp_path)
    vae = make_vae(VAE, rngs=nnx.Rngs(0))
    run = VAERun(
        out=str(tmp_path / "vae"), model=VAE, data=ClipsConfig(), loss=VAELossConfig(), train=LoopConfig()
    )
    write_run(run, param_paths(vae))
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
    assert result_step(tmp_path / "out") == 3
    found, expected = logged(tmp_path / "out"), logged(tmp_path / "alone")
    assert len(found) == len(expected) == 4
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name in other.keys() - {"seconds"}:
            # Adam makes whole steps of gradients that are almost nothing, and so of rounding.
            np.testing.assert_allclose(one[name], other[name], rtol=2e-3 if number else 1e-5, err_msg=name)
    pictures, wanted = shown(tmp_path / "out"), shown(tmp_path / "alone")
    assert list(pictures) == list(wanted) == ["4.webp", "5.webp"]
    for name, picture in wanted.items():
        assert np.abs(pictures[name] - picture).mean() < 0.02 * picture.std()
