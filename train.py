"""Train a stage: `python train.py configs/tiny_vae.py --train.seconds 1800 --out runs/vae`; see `--help`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import tyro

from lavatar_jax.cli import keep_compilations, run
from lavatar_jax.errors import UserError

USAGE = "usage: python train.py configs/NAME.py [--option value ...]; configs/NAME.py --help lists them"


def load_config(path: str) -> Any:
    """The run that a config file's `get_config()` describes. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}: give one of configs/*.py")
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config()")
    return module.get_config()


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["--help"], ["-h"]):
        print(USAGE)
        return
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"no config is named; {USAGE}")
    default = load_config(arguments[0])
    config = tyro.cli(type(default), default=default, args=arguments[1:], prog=f"train.py {arguments[0]}")

    from lavatar_jax.training.stages import train

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    train(config)


if __name__ == "__main__":
    keep_compilations()
    sys.exit(run(lambda: main(sys.argv[1:])))
