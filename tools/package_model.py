"""Make a model folder of what was trained here.

python tools/package_model.py --vae RUN --dit RUN --out DIR       # a small one, of two runs
python tools/package_model.py --base FOLDER --dit RUN --out DIR   # a converted one, with another transformer
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.tiny_dit import SAMPLING
from lavatar_jax.checkpoints.manifest import DType
from lavatar_jax.checkpoints.store import check_replaceable, config_from_dict, save_model_folder
from lavatar_jax.cli import parse_options, run
from lavatar_jax.config import SamplingConfig
from lavatar_jax.data.shards import read_dataset
from lavatar_jax.errors import UserError
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.training.decoder import load_dit
from lavatar_jax.training.finished import dit_run
from lavatar_jax.training.latents import LatentsConfig, load_vae
from lavatar_jax.training.packaging import package_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make a model folder of what was trained here: give --vae for a small model, --base for a large one."""

    dit: str  # run of stage 1, of its ODE student, or of stage 2; with --vae, adapters are merged
    vae: str | None = None  # of the same latents: run of stage 0 or of its decoder, or a model folder
    base: str | None = None  # converted folder: all but its transformer becomes part of the model too
    dtype: DType | None = None  # of the transformer, with --base; None: as there
    out: str = "lavatar_jax/weights/tiny"  # with --base, it must not be there yet
    name: str | None = None  # None: that of the folder


def package(arguments: Arguments) -> Path:
    """Write the folder. Raises UserError for options that do not go together, and as what it calls."""
    out, dit = Path(arguments.out), Path(arguments.dit)
    if arguments.base is not None and arguments.vae is None:
        package_run(dit, arguments.base, out, dtype=arguments.dtype, name=arguments.name)
    elif arguments.vae is not None and arguments.base is None:
        if arguments.dtype is not None:
            raise UserError("--dtype goes with --base: a small model is written in half precision")
        package_small(dit, arguments.vae, out, arguments.name)
    else:
        raise UserError("give either --vae (of a small model) or --base (of a large one)")
    return out


def package_small(run: Path, vae: str, out: Path, name: str | None = None) -> None:
    """Write the averaged weights in half precision, with the latent statistics of the transformer's data, and
    the sampling of its run."""
    check_replaceable(out)
    trained = dit_run(run)
    data = config_from_dict(LatentsConfig, trained["data"])
    statistics = read_dataset(data.folder)

    vae_config, decoder = load_vae(vae)
    vae_config = dataclasses.replace(vae_config, latent_mean=statistics.mean, latent_std=statistics.std)
    dit = load_dit(run)
    config = AvatarConfig(
        name=name or out.name,
        image_size=data.size,
        dit=dit.config,
        vae=vae_config,
        sampling=config_from_dict(SamplingConfig, trained["sampling"]) if "sampling" in trained else SAMPLING,
        log_mel=LogMelConfig(),
    )
    save_model_folder(out, Avatar(config=config, dit=dit, vae=decoder), np.float16)


def main(arguments: list[str]) -> None:
    folder = package(parse_options(Arguments, arguments, prog="tools/package_model.py"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder}: {size:,.1f} MB")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
