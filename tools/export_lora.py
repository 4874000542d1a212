"""Write what a run with adapters has learned as a LoRA file: `python tools/export_lora.py RUN --out FILE`.

The names are those of the published file, so `tools/convert.py --wan ... --lora FILE` takes it, and so do
programs that load that one. The numbers are the run's averages, in float32; alpha / rank is brought to the
0.5 that the released loader applies to everything.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")


from lavatar_jax.checkpoints.exporting import Parameter, adapter_tensors, write_safetensors
from lavatar_jax.checkpoints.store import config_from_dict
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.cli import parse_options, run
from lavatar_jax.config import DiTConfig
from lavatar_jax.errors import UserError
from lavatar_jax.files import check_new, replacing, write_errors
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.training.finished import checked_average, dit_run, lora_of
from lavatar_jax.training.weights import abstract_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the adapters of a run as a LoRA file."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Run of stage 1, of its ODE student, or of stage 2, with --lora.rank."""
    out: Annotated[Path, arg(metavar="FILE.safetensors")]
    """Where to put the adapters; it must not be there yet."""


def _parameter(path: str, array: np.ndarray) -> Parameter:
    return Parameter(path, array.shape, array.dtype, lambda layer: array if layer is None else array[layer])


def export_lora(folder: Path, out: Path) -> int:
    """Write the averaged adapters of a run -> pairs. Raises UserError for what is no run with adapters."""
    check_new(out)
    config = dit_run(folder)
    adapters, model = lora_of(config), config_from_dict(DiTConfig, config["model"])
    if not adapters.rank:
        raise UserError(
            f"{folder} trained all weights, no adapters: tools/package_model.py makes a model of it"
        )
    wanted = abstract_weights(lambda rngs: CausalDiT(model, rngs=rngs), adapters).params
    average = checked_average(folder, wanted)
    parameters = [_parameter(name, np.asarray(value)) for name, value in average.items()]
    tensors = list(adapter_tensors(parameters, DIT_RULES, adapters.alpha / adapters.rank))
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        write_safetensors(part, tensors)
    return len(tensors) // 3


def main(args: list[str]) -> None:
    options = parse_options(Export, args, prog="tools/export_lora.py")
    print(f"{options.out}: adapters of {export_lora(options.run, options.out)} layers")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
