"""Where the reference's golden data lies, and what to do when it is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(relative: str) -> Path:
    """A file or folder of the shared data, e.g. `shared_path("golden/01_rope")`.

    The data lies beside the repository, not in it: without it the calling test is skipped,
    except in CI, where its absence would silently turn the parity tests off.
    """
    path = SHARED / relative
    if not path.exists():
        reason = f"needs ../shared/{relative}, which is not beside this checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def golden(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(case.json, inputs, outputs) of a golden case by its folder name."""
    folder = shared_path(f"golden/{case}")
    return (
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
    )
