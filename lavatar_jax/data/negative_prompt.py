"""What guidance leads away from, encoded once and kept beside the records: a negative prompt's states."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lavatar_jax.errors import UserError
from lavatar_jax.files import replacing

NEGATIVE = "negative.npz"  # in a folder of records: `prompt`, and `states` [S, E] float16 without padding


def write_negative(folder: Path, prompt: str, states: Float[np.ndarray, "S E"]) -> None:
    """Raises UserError where the folder cannot be written."""
    with replacing(folder / NEGATIVE) as part, part.open("wb") as file:
        np.savez(file, prompt=np.str_(prompt), states=states.astype(np.float16))


def read_negative(folder: str | Path) -> tuple[str, Float[np.ndarray, "S E"]] | None:
    """(prompt, states) as written; None where there is none. Raises UserError for a damaged file."""
    path = Path(folder) / NEGATIVE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return str(stored["prompt"]), stored["states"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged: remove it, and run tools/prepare_data.py again") from None
