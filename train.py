"""Train a stage: `python train.py configs/tiny_vae.py --train.seconds 1800 --out runs/vae`.

See docs/training.md. `--plan` only says what memory it needs on how many devices.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from lavatar_jax.cli import configure_jax, parse_options, run
from lavatar_jax.errors import UserError

USAGE = (
    "usage: python train.py configs/NAME.py [--plan] [--option value ...]; configs/NAME.py --help lists them"
)

DESCRIPTION = "Train this stage. --plan: only say what memory it needs, on 128, 64 and 8 devices."


def load_config(path: str) -> Any:
    """The run that a config file's `get_config()` describes. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}: give one of configs/*.py")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: give one of configs/*.py")
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
    path, *options = arguments
    default = load_config(path)
    only_plan = "--plan" in options
    options = [option for option in options if option != "--plan"]
    config = parse_options(
        type(default), options, prog=f"train.py {path}", default=default, description=DESCRIPTION
    )

    if only_plan:
        from lavatar_jax.training.checks import check_run
        from lavatar_jax.training.plan import plan_text
        from lavatar_jax.training.subjects import subject

        check_run(config)
        print(plan_text(config, subject(config)))
        return

    from lavatar_jax.training.distributed import initialize
    from lavatar_jax.training.stages import train

    initialize(config.distributed)
    train(config)


if __name__ == "__main__":
    configure_jax()
    sys.exit(run(lambda: main(sys.argv[1:])))
