"""The VAE of a run as a PyTorch file: a conversion with it has the numbers of the run."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.checkpoints.conversion import Task, convert_folder
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.cli import run as exit_code
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.training.latents import load_vae
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.vae import VAELossConfig, VAERun
from tests import published
from tests.published import write_published
from tests.tiny import random_vae
from tests.training.finished_run import write_run
from tools.export_vae import main
from tools.pth import PickledTensors


def test_what_was_trained_is_what_a_conversion_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dataclasses.replace(published.VAE_CONFIG, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)
    run = VAERun(
        out=str(tmp_path / "run"), model=model, data=ClipsConfig(), loss=VAELossConfig(), train=LoopConfig()
    )
    trained = param_paths(random_vae(model, seed=3))
    write_run(run, trained)
    wan = write_published(tmp_path / "published").wan
    file = wan / "Wan2.1_VAE.safetensors"  # is read, not the .pth beside it
    main([run.out, "--out", str(file)])
    assert f"{len(published.vae_shapes())} tensors" in capsys.readouterr().out
    convert_folder(Task(wan=wan, out=tmp_path / "model"), PickledTensors)
    found = param_paths(load_vae(tmp_path / "model")[1])
    assert found.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(found[name], np.asarray(value).astype(found[name].dtype))

    assert exit_code(lambda: main([run.out, "--out", str(file)])) == 2
    assert "exists already" in capsys.readouterr().err
    shutil.rmtree(run.out)
    assert exit_code(lambda: main([run.out, "--out", str(tmp_path / "new.safetensors")])) == 2
    assert "neither a run of stage 0 nor a model folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))
