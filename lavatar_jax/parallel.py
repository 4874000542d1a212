"""Meshes of the pipeline: a `stage` axis of denoising steps, a `tensor` axis inside a stage, replicas.

Which parameter is split along which axis is decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavatar_jax.errors import UserError

STAGE, TENSOR = "stage", "tensor"
Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineLayout:
    """How many devices run the denoising steps, and where the decoder lives.

    `stages` divides the number of steps: each stage runs `steps / stages` of them. `tensor` devices share
    the matrices of a stage. `own_decoder`: the VAE has a device of its own behind the stages (the paper's
    fifth), otherwise it shares the last stage's.
    """

    stages: int = 4
    tensor: int = 1
    own_decoder: bool = True

    @property
    def devices(self) -> int:
        return self.stages * self.tensor + self.own_decoder


def layout_for(devices: int, steps: int) -> PipelineLayout:
    """The layout that uses all of `devices` for `steps` denoising steps.

    One device runs everything. Raises UserError with the numbers of devices that work.
    """
    if devices == 1:
        return PipelineLayout(stages=1, own_decoder=False)
    layouts = [
        PipelineLayout(stages=stages, own_decoder=own)
        for stages in range(1, steps + 1)
        for own in (True, False)
        if steps % stages == 0
    ]
    fitting = [layout for layout in layouts if layout.devices == devices]
    if not fitting:
        numbers = ", ".join(map(str, sorted({layout.devices for layout in layouts})))
        raise UserError(
            f"{devices} devices do not divide {steps} denoising steps evenly; devices that work: {numbers}"
        )
    return max(fitting, key=lambda layout: layout.stages)


def ask_for_cpu_devices(count: int) -> None:
    """Let a machine without accelerators show `count` virtual devices; before anything is computed.

    They share its cores: nothing gets faster, but everything that runs on a cluster can be tried.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # something was computed already: devices are what they are
            jax.config.update("jax_num_cpu_devices", count)


def take_devices(count: int, devices: Sequence[jax.Device] | None = None) -> list[jax.Device]:
    """The first `count` devices. Raises UserError when there are fewer."""
    found = list(jax.devices() if devices is None else devices)
    if len(found) < count:
        hint = f"; on CPU set XLA_FLAGS=--xla_force_host_platform_device_count={count} to try it"
        raise UserError(
            f"{count} devices are needed, {len(found)} found ({found[0].platform})"
            + (hint if found[0].platform == "cpu" else "")
        )
    return found[:count]


def stage_mesh(layout: PipelineLayout, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of the denoising ring, axes (stage, tensor); a decoder's own device is left out."""
    ring = np.array(devices[: layout.stages * layout.tensor]).reshape(layout.stages, layout.tensor)
    return Mesh(ring, (STAGE, TENSOR))


def replicas(layout: PipelineLayout, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Groups of devices for as many independent pipelines as fit: the data axis of serving.

    Replicas never talk to each other, so they are separate meshes and not an axis of one.
    """
    size = layout.devices
    return [list(devices[i : i + size]) for i in range(0, len(devices) - size + 1, size)]


# Dotted parameter path -> axis that is split over `tensor`, counted from the end, as leaves are stacked.
# Column-parallel into heads and hidden units, row-parallel out of them: one all-reduce per pair.
_TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"(blocks\.(self|cross)_attn|injectors\.attention)\.[qkv]\.weight", -1),
    (r"(blocks\.(self|cross)_attn|injectors\.attention)\.[qkv]\.bias", -1),
    (r"(blocks\.(self|cross)_attn|injectors\.attention)\.norm_[qk]\.weight", -1),
    (r"(blocks\.(self|cross)_attn|injectors\.attention)\.o\.weight", -2),
    (r"blocks\.ffn\.inner\.(weight|bias)", -1),
    (r"blocks\.ffn\.outer\.weight", -2),
)


def tensor_spec(path: str, shape: tuple[int, ...], tensor: int) -> P:
    """The partition of a parameter over the tensor axis; everything no rule names is replicated.

    Parts of a quantised weight follow the weight: their paths continue its path, and an axis of length 1
    (a scale for all) stays whole.
    """
    for pattern, axis in _TENSOR_RULES:
        if tensor > 1 and re.match(rf"{pattern}(\.|$)", path) and len(shape) >= -axis:
            if shape[axis] == 1:
                return P()
            if shape[axis] % tensor:
                raise UserError(f"{path} has {shape[axis]} units, which {tensor} devices cannot share evenly")
            names: list[str | None] = [None] * len(shape)
            names[axis] = TENSOR
            return P(*names)
    return P()


def place_model(model: Model, mesh: Mesh) -> Model:
    """Parameters on every stage of the mesh, split along its tensor axis."""

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.device_put(leaf, NamedSharding(mesh, tensor_spec(name, leaf.shape, mesh.shape[TENSOR])))

    return jax.tree_util.tree_map_with_path(place, model)
