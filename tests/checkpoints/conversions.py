"""What tests of conversion share."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from lavatar_jax.checkpoints.conversion import Task
from lavatar_jax.cli import run
from lavatar_jax.models.dit import CausalDiT
from tests import published
from tests.published import Published

ROOT = Path(__file__).resolve().parents[2]


def task_of(source: Published, out: Path, **changes) -> Task:
    return dataclasses.replace(Task(wan=source.wan, out=out), **changes)


def abstract_dit() -> CausalDiT:
    return jax.eval_shape(lambda: CausalDiT(published.DIT_CONFIG, rngs=nnx.Rngs(0)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def chunks_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("c/**/*") if path.is_file()]


def command(main, *arguments: str | Path) -> int:
    return run(lambda: main([str(argument) for argument in arguments]))
