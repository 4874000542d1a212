"""Meshes of the pipeline (`stage`, `tensor`) and of training (`data`, `fsdp`, `tensor`).

Which parameter is split along which axis is decided here and nowhere else.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavatar_jax.errors import UserError

STAGE, TENSOR = "stage", "tensor"
DATA, FSDP = "data", "fsdp"
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


def claim_devices(count: int, steps: int) -> PipelineLayout:
    """What `--devices N` of a command line means: the layout of that many devices, which are there.

    To be called before anything is computed, as a CPU is asked for virtual ones. Raises UserError.
    """
    try:
        layout = layout_for(count, steps)
        ask_for_cpu_devices(count)
        take_devices(count)
    except UserError as error:
        raise UserError(f"--devices {count}: {error}") from None
    return layout


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

    Parts of a quantised or adapted weight follow the weight: their paths continue its path, and an axis of
    length 1 (a scale for all) stays whole, as does the rank of an adapter.
    """
    for pattern, axis in _TENSOR_RULES:
        if tensor > 1 and re.match(rf"{pattern}(\.|$)", path) and len(shape) >= -axis:
            if shape[axis] == 1 or path.endswith(".weight.a" if axis == -1 else ".weight.b"):
                return P()
            if shape[axis] % tensor:
                raise UserError(f"{path} has {shape[axis]} units, which {tensor} devices cannot share evenly")
            names: list[str | None] = [None] * len(shape)
            names[axis] = TENSOR
            return P(*names)
    return P()


def _name_of(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, such as `blocks.self_attn.q.weight.a`, without what holds it."""
    return re.sub(r"\.value(?=\.|$)", "", jax.tree_util.keystr(path, simple=True, separator="."))


def place_model(model: Model, mesh: Mesh) -> Model:
    """Parameters on every stage of the mesh, split along its tensor axis."""

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = _name_of(path)
        return jax.device_put(leaf, NamedSharding(mesh, tensor_spec(name, leaf.shape, mesh.shape[TENSOR])))

    return jax.tree_util.tree_map_with_path(place, model)


# ---- training --------------------------------------------------------------------------------------------

STACKED = ("blocks", "injectors")  # modules whose parameters have a leading layer axis
BATCH = P((DATA, FSDP))  # samples go to all devices that do not share one by tensor parallelism

_training_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("training_mesh", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share a training step: data x fsdp x tensor of them.

    `data`: groups with a copy of the parameters each; None: as many as there are accelerators for (on CPU
    one: virtual devices share the cores). `fsdp`: devices that split parameters, gradients and
    optimizer state, and gather a layer when they compute it. `tensor`: devices that split heads and hidden
    units.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1


def train_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None, *, samples: int | None = None
) -> Mesh:
    """The mesh (data, fsdp, tensor); with several processes, of all devices.

    `samples`: of one batch. A single process, where `config.data` is None, uses only as many devices as can
    share them evenly: a small recipe runs on a large machine too.

    Raises UserError when devices are missing, or would be left over in another process.
    """
    for name in ("data", "fsdp", "tensor"):
        if (size := getattr(config, name)) is not None and size < 1:
            raise UserError(f"--mesh.{name} {size}: give the number of devices along it, at least 1")
    found = list(jax.devices() if devices is None else devices)
    inner, data = config.fsdp * config.tensor, config.data
    if data is None:
        alone = found[0].platform == "cpu" and jax.process_count() == 1
        data = 1 if alone else max(1, len(found) // inner)
        if samples is not None and jax.process_count() == 1:
            data = next((n for n in range(data, 0, -1) if samples % (n * config.fsdp) == 0), data)
    taken = take_devices(data * inner, found)
    if jax.process_count() > 1 and len(taken) != len(found):
        raise UserError(
            f"a mesh of {data} x {config.fsdp} x {config.tensor} devices leaves out some of the {len(found)} "
            "of all processes: change --mesh.data, --mesh.fsdp or --mesh.tensor"
        )
    # Neighbours in the list are neighbours in the machine: the axes that talk most come last.
    return Mesh(np.array(taken).reshape(data, config.fsdp, config.tensor), (DATA, FSDP, TENSOR))


def param_spec(name: str, shape: tuple[int, ...], *, fsdp: int, tensor: int) -> P:
    """The partition of a parameter: its tensor rule, and fsdp along the longest other axis that it divides.

    The layer axis of stacked modules stays whole, because a scan takes layer after layer. Vectors are small
    and stay whole too.
    """
    axes = list(tensor_spec(name, shape, tensor))
    axes += [None] * (len(shape) - len(axes))
    first = int(name.split(".")[0] in STACKED)
    if fsdp > 1 and len(shape) - first >= 2:
        free = [axis for axis in range(first, len(shape)) if axes[axis] is None and shape[axis] % fsdp == 0]
        if free:
            axes[max(free, key=lambda axis: shape[axis])] = FSDP
    return P(*axes)


def _parameter_name(path: tuple[Any, ...]) -> str:
    """The parameter that a leaf of a state belongs to: optimizers keep dictionaries by the same names."""
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return str(keys[-1]) if keys else jax.tree_util.keystr(path, simple=True, separator=".")


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Where the leaves of a state (arrays or abstract) live: parameters and all that has their names and
    shapes (moments, averages) by `param_spec`, the rest on every device."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, shape = _parameter_name(path), np.shape(leaf)
        return NamedSharding(mesh, param_spec(name, shape, fsdp=mesh.shape[FSDP], tensor=mesh.shape[TENSOR]))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_shards(mesh: Mesh) -> int:
    """How many devices, or groups of them with tensor parallelism, a batch is split over."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Which one of how many equal parts of a batch this process loads.

    Processes whose devices share samples by tensor parallelism load the same part. Raises UserError when
    some of the devices of a process share them with another one, and others do not.
    """
    tensor, local = mesh.shape[TENSOR], len(mesh.local_devices)
    groups = mesh.devices.reshape(-1, tensor)  # in the order of the samples
    here = jax.process_index()
    mine = [i for i, group in enumerate(groups) if any(device.process_index == here for device in group)]
    part = mine[0] // len(mine)
    whole = mine == list(range(part * len(mine), (part + 1) * len(mine)))
    if max(tensor, local) % min(tensor, local) or not whole:
        raise UserError(
            f"--mesh.tensor {tensor} does not fit {local} devices in a process: one must divide the other"
        )
    return part, len(groups) // len(mine)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's part of the samples (numpy, [B, ...] each) -> global arrays, split over data and fsdp.

    Raises UserError when the samples of all processes cannot be split evenly.
    """
    shards, (_, parts) = batch_shards(mesh), batch_part(mesh)
    sharding = NamedSharding(mesh, BATCH)

    def put(leaf: Any) -> jax.Array:
        samples = leaf.shape[0] * parts
        if samples % shards:
            raise UserError(
                f"a batch of {samples} cannot be split evenly over {shards} (data x fsdp) devices"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), (samples, *leaf.shape[1:]))

    with jax.transfer_guard_host_to_device("allow"):  # this one is meant
        return jax.tree.map(put, batch)


def put_everywhere(value: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
    """A host's number or array on every device of all processes, which must have the same."""
    everywhere = NamedSharding(mesh, P())
    with jax.transfer_guard_host_to_device("allow"):  # this one is meant
        return jax.make_array_from_callback(np.shape(value), everywhere, lambda _: np.asarray(value))


def put_tree(tree: Any, shardings: Any) -> Any:
    """Arrays where `shardings` (a tree alike) says; what is there already is not touched.

    Of several processes each must have the whole of what is not.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index].copy())

    return jax.tree.map(put, tree, shardings)


@contextlib.contextmanager
def sharded_training(mesh: Mesh | None) -> Iterator[None]:
    """Programs that are traced inside pin activations to the batch, and gather weights layer by layer.

    Left alone, the compiler may split the activations as the weights are, and exchange the larger of both.
    """
    token = _training_mesh.set(mesh if mesh is not None and mesh.size > 1 else None)
    try:
        yield
    finally:
        _training_mesh.reset(token)


def is_sharded() -> bool:
    """Whether `sharded_training` is in force, on more than one device."""
    return _training_mesh.get() is not None


def split_samples(x: jax.Array) -> jax.Array:
    """Pin an activation [B, ...] to the devices of its samples, where training is sharded."""
    mesh = _training_mesh.get()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def gather_parts(tree: Model, prefix: str = "") -> Model:
    """Undo the fsdp split of parameters just before they are used, where training is sharded.

    `prefix`: the dotted path of `tree` in the model, where it is a part. Gradients are split again.
    """
    mesh = _training_mesh.get()
    if mesh is None:
        return tree

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = tensor_spec(prefix + _name_of(path), leaf.shape, mesh.shape[TENSOR])
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(gather, tree)
