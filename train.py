"""Train a stage: `python train.py configs/tiny_vae.py --train.seconds 1800 --out runs/vae`.

See docs/training.md. `--plan` only says what memory it needs on how many devices.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any

from lavatar_jax.cli import configure_jax, parse_options, run, share_compiled
from lavatar_jax.errors import UserError
from lavatar_jax.huge_pages import start_with_huge_pages

USAGE = (
    "usage: python train.py configs/NAME.py [--plan] [--option value ...]; configs/NAME.py --help lists them"
)

DESCRIPTION = (
    "Train this stage. --plan: only say what memory it needs, on 128, 64 and 8 devices of 80 GB; "
    "--plan-devices 1,4 and --plan-gpu a100: on others."
)


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


def parse_plan(options: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """-> (what is to be planned, the other options). Raises UserError."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--plan-devices", default="128,64,8")
    parser.add_argument("--plan-gpu", default="h100")
    try:
        plan, rest = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    counts = plan.plan_devices.split(",")
    if not all(count.isdigit() and int(count) for count in counts):
        raise UserError(f"--plan-devices {plan.plan_devices}: give numbers of devices, such as 8,64")
    plan.plan_devices = [int(count) for count in counts]
    return plan, rest


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["--help"], ["-h"]):
        print(USAGE)
        return
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"no config is named; {USAGE}")
    path, *options = arguments
    default = load_config(path)
    plan, options = parse_plan(options)
    config = parse_options(
        type(default), options, prog=f"train.py {path}", default=default, description=DESCRIPTION
    )

    if plan.plan:
        from lavatar_jax.evaluation.devices import gpu
        from lavatar_jax.training.checks import check_run
        from lavatar_jax.training.plan import plan_text
        from lavatar_jax.training.subjects import subject

        gpu(plan.plan_gpu)
        check_run(config)
        print(plan_text(config, subject(config), counts=plan.plan_devices, gpu=plan.plan_gpu.lower()))
        return

    if hasattr(signal, "SIGUSR1"):  # asks for a profile; who asks before the training begins, must not end it
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    import jax

    from lavatar_jax.training.distributed import initialize, is_out_of_memory, no_room
    from lavatar_jax.training.stages import train

    initialize(config.distributed)
    if jax.process_count() > 1:
        share_compiled(Path(config.out))
    try:
        train(config)
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise no_room(error) from None
        raise


if __name__ == "__main__":
    start_with_huge_pages(__file__)
    configure_jax()
    sys.exit(run(lambda: main(sys.argv[1:])))
