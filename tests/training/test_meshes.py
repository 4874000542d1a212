"""One training run on several meshes of virtual devices: the same losses, with the state split for real."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavatar_jax import parallel
from lavatar_jax.errors import UserError
from lavatar_jax.parallel import (
    STACKED,
    MeshConfig,
    batch_part,
    param_spec,
    put_batch,
    put_everywhere,
    sharded_training,
    state_shardings,
    train_mesh,
)
from lavatar_jax.training import decoder, diffusion_forcing, distill, ode_init, precision, stages, vae
from lavatar_jax.training.diffusion_forcing import DiTRun
from lavatar_jax.training.distill import DistillRun
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.ode_init import OdeRun
from lavatar_jax.training.state import TrainState
from lavatar_jax.training.vae import VAERun
from tests.training.toy_run import BATCH, Batches, begin, losses, mesh_of, train
from train import load_config

pytestmark = pytest.mark.timeout(1800)  # a program for eight devices takes minutes to compile on a busy core

STEPS = 4
CONFIGS = Path(__file__).parents[2] / "configs"


def train_dit(out: Path, mesh: Mesh, **options: Any) -> TrainState:
    begun = options.pop("begun", None) or begin(mesh, dit=True)
    return train(out, STEPS, mesh, begun=begun, batches=Batches(dit=True), **options)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses on one device."""
    out = tmp_path_factory.mktemp("alone")
    train_dit(out, mesh_of(1, 1, 1))
    found = losses(out)
    assert len(found) == STEPS
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (2, 2, 2)])
def test_losses_do_not_depend_on_the_mesh(shape: tuple[int, int, int], alone: list[float], tmp_path: Path):
    state = train_dit(tmp_path, mesh_of(*shape))
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)
    name = "blocks.ffn.inner.weight"  # [2, 16, 24]
    share = np.prod(shape[1:])
    for tree in (state.params, state.average, jax.tree.leaves(state.optimizer, is_leaf=_named)[0].mu):
        part = tree[name].addressable_shards[0].data
        assert part.size * share == tree[name].size, "every device has its part and no more"


def _named(node: object) -> bool:
    return hasattr(node, "mu")


def test_a_run_goes_on_where_it_was_on_another_mesh(alone: list[float], tmp_path: Path):
    train_dit(tmp_path, mesh_of(1, 1, 1), stop_at=2)
    train_dit(tmp_path, mesh_of(2, 2, 1))
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)


def test_a_batch_in_parts_equals_the_whole(alone: list[float], tmp_path: Path):
    mesh = mesh_of(2, 1, 1)
    loop = LoopConfig(learning_rate=0.01, warmup=0.0, batch=BATCH, accumulate=2)
    train_dit(tmp_path, mesh, loop=loop, begun=begin(mesh, dit=True, accumulate=2))
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)


def test_rounded_operands_compute_on_devices_with_one_sample_each(alone, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    mesh = mesh_of(2, 1, 1)
    loop = LoopConfig(learning_rate=0.01, warmup=0.0, batch=BATCH, accumulate=4)
    begun = begin(mesh, dit=True, accumulate=4, precision="operands")
    train_dit(tmp_path, mesh, loop=loop, begun=begun)
    assert losses(tmp_path) != alone
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=2e-2)


def test_parameters_are_split_along_their_longest_free_axis():
    def spec(name: str, *shape: int) -> P:
        return param_spec(name, shape, fsdp=2, tensor=2)

    assert spec("blocks.ffn.inner.weight", 4, 8, 16) == P(None, "fsdp", "tensor")
    assert spec("blocks.ffn.outer.weight", 4, 16, 8) == P(None, "tensor", "fsdp")
    assert spec("blocks.self_attn.q.weight.a", 4, 8, 2) == P(None, "fsdp", None), "the rank is whole"
    assert spec("blocks.self_attn.q.weight.b", 4, 2, 8) == P(None, "fsdp", "tensor")
    assert spec("blocks.modulation", 4, 6, 8) == P(None, None, "fsdp")
    assert spec("blocks.norm3.weight", 4, 8) == P(None, None), "vectors are small"
    assert spec("patch_embed.weight", 1, 3, 3, 5, 7) == P(None, None, None, None, None), "nothing divides"


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="a batch of 3 cannot be split evenly over 4"):
        put_batch({"latent": np.zeros((3, 2))}, mesh_of(2, 2, 1))


@pytest.mark.parametrize(
    ("processes", "shape", "parts"),
    [
        (2, (4, 1, 1), [(0, 2), (1, 2)]),
        (4, (1, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (2, (1, 1, 4), [(0, 1), (0, 1)]),
        (2, (2, 1, 2), [(0, 2), (1, 2)]),
    ],
)
def test_processes_load_the_rows_of_their_devices(
    processes: int, shape: tuple[int, int, int], parts: list[Any], monkeypatch: pytest.MonkeyPatch
):
    assert parts == [batch_part(mesh) for mesh in in_processes(processes, shape, monkeypatch)]


def test_processes_that_share_some_of_their_samples_only_are_refused(monkeypatch: pytest.MonkeyPatch):
    for mesh in in_processes(2, (3, 1, 2), monkeypatch):
        with pytest.raises(UserError, match=r"--mesh\.tensor 2 does not fit 3 devices in a process"):
            batch_part(mesh)


def in_processes(processes: int, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mesh as each of the processes sees it, which have equally many of the devices."""
    count = int(np.prod(shape))
    devices = [SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    for here in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda here=here: here)
        yield SimpleNamespace(
            shape=dict(zip(("data", "fsdp", "tensor"), shape, strict=True)),
            devices=np.array(devices).reshape(shape),
            local_devices=[device for device in devices if device.process_index == here],
        )


def test_a_batch_for_few_devices_leaves_the_others_idle(monkeypatch: pytest.MonkeyPatch):
    gpus: Any = [SimpleNamespace(platform="gpu") for _ in range(8)]
    monkeypatch.setattr(parallel, "Mesh", lambda devices, names: devices)
    shapes = {samples: train_mesh(MeshConfig(), gpus, samples=samples).shape for samples in (2, 6, 8, None)}
    assert shapes == {2: (2, 1, 1), 6: (6, 1, 1), 8: (8, 1, 1), None: (8, 1, 1)}
    assert train_mesh(MeshConfig(fsdp=2), gpus, samples=4).shape == (2, 2, 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert train_mesh(MeshConfig(), gpus, samples=2).shape == (8, 1, 1), "none may be left out"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tiny_*.py")), ids=lambda path: path.stem)
def test_the_small_recipes_run_on_eight_gpus(path: Path, monkeypatch: pytest.MonkeyPatch):
    gpus: Any = [SimpleNamespace(platform="gpu") for _ in range(8)]
    chosen: list[int] = []

    def choose(config: MeshConfig, *, samples: int | None = None) -> None:
        chosen.append(train_mesh(config, gpus, samples=samples).shape[0])
        raise UserError("that is enough")

    run = load_config(str(path))
    stage = {VAERun: vae, DiTRun: diffusion_forcing, DistillRun: distill, OdeRun: ode_init}
    monkeypatch.setattr(parallel, "Mesh", lambda devices, names: devices)
    monkeypatch.setattr(stage.get(type(run), decoder), "train_mesh", choose)
    with pytest.raises(UserError, match="enough"):
        stages.train(run)
    assert run.train.batch % chosen[0] == 0
    assert chosen[0] == min(run.train.batch, 8)


def test_missing_devices_are_a_clear_error():
    with pytest.raises(UserError, match="64 devices are needed, 9 found"):
        train_mesh(MeshConfig(data=8, fsdp=8))


def test_parts_that_do_not_divide_the_batch_are_refused(tmp_path: Path):
    loop = dataclasses.replace(LoopConfig(), batch=8, accumulate=3)
    with pytest.raises(UserError, match=r"cannot be split evenly over 1 .* in 3 equal parts"):
        train(tmp_path, 1, mesh_of(1, 1, 1), loop=loop)


def test_layers_are_gathered_one_by_one_and_activations_stay_where_they_are():
    mesh = mesh_of(1, 4, 1)
    step_fn, state, frozen = begin(mesh, dit=True)
    places = (state_shardings(state, mesh), NamedSharding(mesh, P()))
    batch, rate = put_batch(next(Batches(dit=True)), mesh), put_everywhere(np.float32(0.1), mesh)
    with sharded_training(mesh):
        program = jax.jit(step_fn, out_shardings=places).lower(state, frozen, batch, rate).compile().as_text()
    assert not re.search(r" (all-to-all|collective-permute)(-start)?\(", program)
    gathered = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", program)
    }
    assert (1, 16, 16) in gathered, "a matrix of one layer"
    weights = {value.shape for value in state.params.values()}
    layers = {(1, *value.shape[1:]) for name, value in state.params.items() if name.startswith(STACKED)}
    split = {value.shape for name, value in state.params.items() if name.startswith(STACKED)}
    stacks = {shape for shape in split if shape[0] > 1 and len(shape) > 2}  # of matrices of several layers
    assert not gathered & stacks, "never all layers at once"
    sizes = {np.prod(shape) for shape in (weights - split) | layers}
    assert all(np.prod(shape) in sizes for shape in gathered), "weights and nothing else"
