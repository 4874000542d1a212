"""Whether a result will fit on the disk that it is meant for."""

from __future__ import annotations

import shutil
from pathlib import Path

from lavatar_jax.errors import UserError


def check_space(partial: Path, needed: int) -> None:
    """That there is room for a folder of `needed` bytes, of which some may be there. Raises UserError."""
    place = next(parent for parent in partial.absolute().parents if parent.is_dir())
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free
    if needed - there > free:
        raise UserError(
            f"{place} has {free / 1e9:.1f} GB of free space, the result needs "
            f"{(needed - there) / 1e9:.1f} GB; give an --out on a larger disk"
        )
