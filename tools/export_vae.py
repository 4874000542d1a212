"""Write the VAE of a run as a PyTorch file: `python tools/export_vae.py RUN --out Wan2.1_VAE.safetensors`.

Names and layouts are the published ones, numbers the run's averages in float32. `tools/convert.py` takes the
file where it lies beside a published folder's `Wan2.1_VAE.pth`. Only the decoder may be new there
(`--loss.decoder-only`), as the transformer knows the latents of the published encoder.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

from safetensors.numpy import save_file
from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from lavatar_jax.checkpoints.convert import export
from lavatar_jax.checkpoints.tables_vae import VAE_RULES
from lavatar_jax.cli import parse_options, run
from lavatar_jax.files import check_new, replacing, write_errors
from lavatar_jax.training.latents import load_vae


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the VAE of a run as a PyTorch file."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Run of stage 0 or of its decoder, or a model folder."""
    out: Annotated[Path, arg(metavar="FILE.safetensors")]
    """Where to put the file; it must not be there yet."""


def export_vae(place: str, out: Path) -> int:
    """Write the VAE of a run or model folder -> tensors. Raises UserError for what has none."""
    check_new(out)
    config, vae = load_vae(place)
    tensors = export(vae, VAE_RULES[config.kind])
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        save_file(tensors, part)
    return len(tensors)


def main(args: list[str]) -> None:
    options = parse_options(Export, args, prog="tools/export_vae.py")
    print(f"{options.out}: {export_vae(options.run, options.out)} tensors")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
