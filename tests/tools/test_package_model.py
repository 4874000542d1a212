"""Two runs become a model folder, at the best checkpoint where that was kept."""

from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.runs import CheckpointConfig
from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.config import SamplingConfig
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.errors import UserError
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.vae import VAELossConfig, VAERun
from tests.tiny import random_dit, random_vae, tiny_config, tiny_vae_config
from tests.training.finished_run import write_run
from tools.package_model import main


def test_the_best_checkpoint_is_packaged(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "latents") as writer:
        latent, audio = np.zeros((3, 4, 4, 3), np.float16), np.zeros((1, 5, 12), np.float16)
        writer.write({"id": "0", "caption": "", "latent": latent, "reference": latent[:1], "audio": audio})
        writer.finish(mean=np.full(3, 0.25), std=np.full(3, 2.0), encoder={})
    sampling = SamplingConfig(motion=False, steps=2)
    dit = DiTRun(
        out=str(tmp_path / "dit"), model=tiny_config(), data=LatentsConfig(folder=str(tmp_path / "latents")),
        sampling=sampling, loss=ForcingConfig(), train=LoopConfig(),
        checkpoint=CheckpointConfig(keep=1, best="held_out_flow", best_mode="min"),
    )  # fmt: skip
    vae = VAERun(
        out=str(tmp_path / "vae"), model=tiny_vae_config(), data=ClipsConfig(), loss=VAELossConfig(),
        train=LoopConfig(),
    )  # fmt: skip
    write_run(vae, param_paths(random_vae(tiny_vae_config())))
    models = [random_dit(tiny_config(), seed=seed) for seed in (1, 2)]
    for step, model in enumerate(models, 1):
        write_run(dit, param_paths(model), step=step, metrics={"held_out_flow": float(step)})

    main(["--vae", vae.out, "--dit", dit.out, "--out", str(tmp_path / "model")])
    avatar = load_model_folder(tmp_path / "model")
    assert avatar.config.sampling == sampling
    assert avatar.config.vae.latent_mean == (0.25,) * 3
    found = param_paths(avatar.dit)
    for name, value in param_paths(models[0]).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-6, err_msg=name)

    with pytest.raises(UserError, match="holds other things than a small model"):
        main(["--vae", vae.out, "--dit", dit.out, "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit", "latents", "model", "vae"]
    main(["--vae", vae.out, "--dit", dit.out, "--out", str(tmp_path / "model"), "--name", "other"])
    assert load_model_folder(tmp_path / "model").config.name == "other"
