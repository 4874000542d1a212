"""A run of a small model on made-up records, as a script: tests kill it, resume it, and spread it out.

`python toy.py OUT STEPS [--devices N] [--mesh DATA FSDP TENSOR] [--coordinator ADDRESS --processes N --id I]
[--slow SECONDS]`; saves after each step, and prints `step N` before; `done` at the end.
"""

import argparse
import os
import sys
import time
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--mesh", type=int, nargs=3, default=(1, 1, 1))
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--id", type=int)
    parser.add_argument("--slow", type=float, default=0.0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    sys.path.insert(0, str(Path(__file__).parents[2]))

    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    from lavatar_jax.cli import run
    from lavatar_jax.training.distributed import DistributedConfig, initialize
    from tests.training.toy_run import mesh_of, train

    initialize(
        DistributedConfig(
            coordinator=options.coordinator,
            processes=options.processes,
            process_id=options.id,
            heartbeat=10,
        )
    )

    def told(step: int) -> None:
        print(f"step {step}", flush=True)
        time.sleep(options.slow)

    def main() -> None:
        train(options.out, options.steps, mesh_of(*options.mesh), told=told, save_seconds=0.0)
        print("done", flush=True)

    sys.exit(run(main))


if __name__ == "__main__":
    main()
