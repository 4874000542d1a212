"""A recorded case on disk, and one comparison of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from lavatar_jax.checkpoints.convert import Rule, convert
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.config import DiTConfig
from lavatar_jax.models.dit import CausalDiT

Tolerance = tuple[float, float]  # rtol, atol
EXACT: Tolerance = (0.0, 0.0)
DRAWN = "noise."  # random numbers that were recorded beside the outputs: the cases start from them


class Check(NamedTuple):
    """One tensor: what we compute and what the reference did.

    `name` and `variant` are those of the recorded output (see `Case.recorded`); a comparison with something
    else, or a second way to the same output, has others.
    """

    name: str
    got: Any
    want: Any
    tolerance: Tolerance
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name


class Case:
    """`case.json` with its tensors; `variant` picks `outputs_<variant>.safetensors`.

    Raises OSError or ValueError where a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: dict[str, Any] = json.loads((folder / "case.json").read_text())
        self.name: str = self.info.get("case", folder.resolve().name)
        if not isinstance(self.name, str):
            raise ValueError(f"case.json: the case is named {self.name!r}, which is no text")
        self.inputs = self._load("inputs") if self._exists("inputs") else {}
        self.weights = self._load("weights") if self._exists("weights") else {}

    def __getitem__(self, key: str) -> Any:
        return self.info[key]

    def _exists(self, name: str) -> bool:
        return (self.folder / f"{name}.safetensors").exists()

    def _load(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def variants(self) -> tuple[str, ...]:
        """Variants that `case.json` names or that have an `outputs_<variant>.safetensors`."""
        found = {path.stem.removeprefix("outputs_") for path in self.folder.glob("outputs_*.safetensors")}
        return tuple(sorted(found | self.info.get("variant_outputs", {}).keys()))

    def outputs(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """(variant, tensors), the main output first under the name ""."""
        yield "", self._load("outputs")
        for variant in self.variants:
            yield variant, self._load(f"outputs_{variant}")

    def recorded(self) -> set[tuple[str, str]]:
        """(variant, name) of all outputs: those that `case.json` names and those that the files hold."""
        named = {"": self.info.get("outputs", {}), **self.info.get("variant_outputs", {})}
        return {
            (variant, name)
            for variant, tensors in self.outputs()
            for name in tensors.keys() | named.get(variant, {})
            if not name.startswith(DRAWN)
        }

    def tolerance(self, *names: str) -> Tolerance:
        """The first named tolerance of the case (or its only one)."""
        table = self.info["tolerance"]
        entries = {key: value for key, value in table.items() if isinstance(value, dict)}
        for name in names:
            if name in entries:
                return entries[name].get("rtol", 0.0), entries[name].get("atol", 0.0)
        (entry,) = entries.values()
        return entry.get("rtol", 0.0), entry.get("atol", 0.0)


def dit_config(config: dict[str, Any], motion_frames: Any = (73, 19)) -> DiTConfig:
    """Our configuration from the reference's keyword arguments."""
    return DiTConfig(
        layers=config["num_layers"],
        width=config["dim"],
        heads=config["num_heads"],
        ffn_width=config["ffn_dim"],
        freq_dim=config["freq_dim"],
        text_dim=config["text_dim"],
        text_len=config["text_len"],
        audio_dim=config["audio_dim"],
        audio_tokens=config["num_audio_token"],
        inject_layers=tuple(config["audio_inject_layers"]),
        motion_frames=tuple(motion_frames),
    )


def load_dit(case: Case, prefix: str = "") -> CausalDiT:
    """The case's transformer, through the converter."""
    config = dit_config(case["config"], case.info.get("motion_frames", (73, 19)))
    abstract = jax.eval_shape(lambda: CausalDiT(config, rngs=nnx.Rngs(0)))
    return convert(with_prefix(case.weights, prefix), DIT_RULES, abstract)


def load_part(tensors: dict[str, np.ndarray], make: Any, path: str, rules: list[Rule] = DIT_RULES) -> Any:
    """One module of a larger model: the rules below `path` (without it) fill `make()`'s shapes."""
    part = [
        Rule(r.pattern, r.path[len(path) + 1 :], r.transform)
        for r in rules
        if r.path and r.path.startswith(path + ".")
    ]
    return convert(tensors, part, jax.eval_shape(make))


def with_prefix(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def last(x: np.ndarray) -> np.ndarray:
    """[..., C, F, H, W] -> [..., F, H, W, C]."""
    return np.moveaxis(x, -4, -1)


def first(x: Any) -> np.ndarray:
    """[..., F, H, W, C] -> [..., C, F, H, W]."""
    return np.moveaxis(np.asarray(x), -1, -4)


def pad_text(states: list[np.ndarray], text_len: int) -> np.ndarray:
    """Prompt states of different lengths, zero-padded to [B, text_len, E]."""
    padded = np.zeros((len(states), text_len, states[0].shape[-1]), np.float32)
    for row, state in zip(padded, states, strict=True):
        row[: len(state)] = state
    return padded
