"""A published folder of small weights, and what it becomes."""

from pathlib import Path

import pytest

from lavatar_jax.checkpoints.conversion import Task, convert_folder
from tests.published import Published, write_published
from tools.pth import PickledTensors


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def bf16(source: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without LoRA."""
    out = tmp_path_factory.mktemp("bf16") / "model"
    convert_folder(Task(wan=source.wan, out=out), PickledTensors)
    return out
