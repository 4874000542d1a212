"""Write a model folder as PyTorch files: `python tools/export_torch.py DIR --out DIR`.

Names, keys and layouts are the published ones; all files are safetensors, the transformer in shards with an
index. Numbers keep their dtype and their bits, 8-bit weights become bfloat16.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from lavatar_jax.checkpoints.exporting import export_folder
from lavatar_jax.cli import parse_options, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model folder as PyTorch files."""

    model: Positional[Annotated[str, arg(metavar="NAME|DIR")]]
    """Shipped model or model folder."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where to put the files; it must not be there yet."""
    shard_gb: float = 5.0
    """Largest shard of the transformer, in GB."""


def main(args: list[str]) -> None:
    options = parse_options(Export, args, prog="tools/export_torch.py")
    counts = export_folder(options.model, options.out, shard_bytes=int(options.shard_gb * 1e9))
    print(f"{options.out}:", ", ".join(f"{name} {count} tensors" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
