"""Make a model folder of two training runs: `python tools/package_model.py --vae RUN --dit RUN --out DIR`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.tiny_dit import SAMPLING
from lavatar_jax.checkpoints.store import check_replaceable, config_from_dict, save_model_folder
from lavatar_jax.cli import parse_options, run
from lavatar_jax.config import SamplingConfig
from lavatar_jax.data.shards import read_dataset
from lavatar_jax.errors import UserError
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.training.decoder import load_dit
from lavatar_jax.training.latents import LatentsConfig, load_vae


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    vae: str  # run of stage 0 or of its decoder (the latents must be the same), or a model folder
    dit: str  # run of stage 1, of its ODE student, or of stage 2; adapters are merged
    out: str = "lavatar_jax/weights/tiny"
    name: str = "tiny"


def package(arguments: Arguments) -> Path:
    """Write the averaged weights in half precision, with the latent statistics of the transformer's data, and
    the sampling of its run."""
    check_replaceable(Path(arguments.out))
    path = Path(arguments.dit) / "config.json"
    if not path.is_file():
        raise UserError(f"{arguments.dit} is not a run of stage 1 or 2: {path} is missing")
    trained = json.loads(path.read_text())
    data = config_from_dict(LatentsConfig, trained["data"])
    statistics = read_dataset(data.folder)

    vae_config, vae = load_vae(arguments.vae)
    vae_config = dataclasses.replace(vae_config, latent_mean=statistics.mean, latent_std=statistics.std)
    dit = load_dit(arguments.dit)
    config = AvatarConfig(
        name=arguments.name,
        image_size=data.size,
        dit=dit.config,
        vae=vae_config,
        sampling=config_from_dict(SamplingConfig, trained["sampling"]) if "sampling" in trained else SAMPLING,
        log_mel=LogMelConfig(),
    )
    out = Path(arguments.out)
    save_model_folder(out, Avatar(config=config, dit=dit, vae=vae), np.float16)
    return out


def main(arguments: list[str]) -> None:
    folder = package(parse_options(Arguments, arguments, prog="tools/package_model.py"))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {size:.1f} MB")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
