"""The plan of the 14B stages by abstract evaluation, and of a small run against what is really allocated."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.cli import parse_options
from lavatar_jax.config import DiTConfig
from lavatar_jax.evaluation.flops import clip_flops, count_flops, step_flops
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.parallel import state_shardings
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.plan import USABLE_MEMORY, Planner, plan_text
from lavatar_jax.training.subjects import subject
from lavatar_jax.training.weights import LoraConfig, initial_weights
from tests.training.toy_run import mesh_of
from train import load_config

ROOT = Path(__file__).parents[2]
MODEL = DiTConfig(
    layers=3, width=16, heads=2, ffn_width=24, latent_channels=4, freq_dim=8, text_dim=6, text_len=4,
    audio_dim=5, audio_layers=2, inject_layers=(1,), use_motion=False, use_pose=False,
)  # fmt: skip


def small(**changes: object) -> DiTRun:
    run = DiTRun(
        model=MODEL, data=LatentsConfig(), loss=ForcingConfig(), clip=(3, 8, 8), train=LoopConfig(batch=8)
    )
    return dataclasses.replace(run, **changes)


def test_the_14b_stage_1_fits_its_devices() -> None:
    run = load_config(str(ROOT / "configs" / "wan14b_forcing.py"))
    about = subject(run)
    rank, width, hidden, layers, injectors = 128, 5120, 13824, 40, 12
    square, oblong = rank * 2 * width, rank * (width + hidden)
    trained = layers * (8 * square + 2 * oblong) + injectors * 4 * square
    assert sum(leaf.size for leaf in about.weights.params.values()) == trained
    assert 16.2e9 < sum(leaf.size for leaf in about.weights.frozen.values()) < 16.4e9
    planner = Planner(run, about)
    for devices in (128, 64, 8):
        layout = planner.suggest(devices, 80)
        assert layout.fits(80)
        assert layout.devices == devices
        assert layout.batch == run.train.batch
        memory = layout.memory
        assert memory["trained"] * layout.fsdp == pytest.approx(4 * trained, rel=1e-3)
        assert memory["optimizer"] == pytest.approx(2 * memory["trained"], rel=1e-3)
    whole = planner.memory(1, 1, 1, 1)
    assert whole["frozen"] == pytest.approx(2 * 16.3e9, rel=0.05), "16 bits but for the float32 islands"
    # The input of every layer is kept: 40 x tokens x width x 2 bytes, tokens of 21 frames and the conditions.
    assert whole["activations"] > 40 * 22 * 1125 * 5120 * 2
    assert planner.memory(1, 8, 1, 1)["frozen"] < whole["frozen"] / 7.5


def test_the_14b_stage_2_fits_its_devices_and_keeps_its_batch() -> None:
    run = load_config(str(ROOT / "configs" / "wan14b_distill.py"))
    planner, mesh = Planner(run, subject(run)), run.mesh
    assert run.train.batch * mesh.tensor == 128, "one clip for each group of devices that share it"
    memory = planner.memory(1, mesh.fsdp, mesh.tensor, 1)
    assert 0.5 * 80e9 < sum(memory.values()) < USABLE_MEMORY * 80e9
    # Four rings of 40 layers: a sink of one frame and 4 blocks of 3 frames, of 45 x 25 tokens each.
    rings, sink = 4 * 2 * 40 * 13 * 1125 * 5120, 40 * 1125 * 5120
    assert memory["cache"] == pytest.approx(2 * (rings + sink) / mesh.tensor, rel=0.01)
    # Eight devices hold the clips and the draws of the whole batch: 2 is too few to share one in between.
    for devices, tensor, parts in ((128, 2, 1), (64, 2, 2), (8, 4, 32)):
        layout = planner.suggest(devices, 80)
        assert layout.fits(80)
        assert (layout.tensor, layout.batch, layout.accumulate) == (tensor, run.train.batch, parts)


def test_the_14b_stage_0_takes_one_crop_a_device() -> None:
    run = load_config(str(ROOT / "configs" / "wan14b_vae.py"))
    planner = Planner(run, subject(run))
    memory = planner.memory(1, 1, 1, 1)
    assert memory["trained"] == pytest.approx(4 * 127e6, rel=0.01), "Wan 2.1's VAE in float32"
    assert 0.5 * 80e9 < sum(memory.values()) < USABLE_MEMORY * 80e9
    for devices in (1, 8):
        layout = planner.suggest(devices, 80)
        assert layout.fits(80)
        assert (layout.batch, layout.accumulate) == (8, 8 // devices)


def test_the_command_prints_a_table() -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / "tiny_dit.py"), "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits" in done.stdout
    table, options = done.stdout.split("so, for train.py:")
    assert [line.split()[0] for line in table.splitlines()[-3:]] == ["128", "64", "8"]
    for line in options.strip().splitlines():
        devices, *arguments = line.split()
        found = parse_options(DiTRun, arguments, prog="train.py", default=small())
        assert found.mesh.data * found.mesh.fsdp * found.mesh.tensor == int(devices)
    assert len(options.strip().splitlines()) == 3


def test_every_small_stage_has_a_plan() -> None:
    plans = {}
    for path in sorted((ROOT / "configs").glob("tiny_*.py")):
        run = load_config(str(path))
        plans[path.stem] = Planner(run, subject(run))
    assert plans.keys() == {
        "tiny_vae",
        "tiny_vae_long",
        "tiny_dit",
        "tiny_dit_long",
        "tiny_ode",
        "tiny_distill",
        "tiny_decoder",
    }
    bytes_of = {name: plan.memory(1, 1, 1, 1) for name, plan in plans.items()}
    # The ODE student learns from a teacher, without a critic.
    trained = bytes_of["tiny_dit"]["trained"]
    assert bytes_of["tiny_ode"]["frozen"] == bytes_of["tiny_ode"]["trained"] == trained
    assert bytes_of["tiny_distill"]["trained"] == 2 * trained
    # Windows of 24 latents and 64 pixels keep less than 25 whole frames of 128 do.
    assert bytes_of["tiny_decoder"]["trained"] == bytes_of["tiny_vae"]["trained"]
    assert 0 < bytes_of["tiny_decoder"]["activations"] < bytes_of["tiny_vae"]["activations"]


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2)])
def test_bytes_of_a_device_are_those_that_are_allocated(lora: LoraConfig) -> None:
    run = small(lora=lora)
    planner, mesh = Planner(run, subject(run)), mesh_of(1, 2, 2)
    weights = initial_weights(run.make, mesh, init=None, seed=0, adapters=lora)
    planned = planner.memory(1, 2, 2, 1)
    for name, part in (("trained", weights.params), ("frozen", weights.frozen)):
        found = sum(leaf.addressable_shards[0].data.nbytes for leaf in part.values())
        assert planned[name] == pytest.approx(found, rel=1e-6)
    shardings = jax.tree.leaves(state_shardings(planner.subject.state.optimizer, mesh))
    leaves = jax.tree.leaves(planner.subject.state.optimizer)
    found = sum(
        int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, shardings, strict=True)
    )
    assert planned["optimizer"] == pytest.approx(found, rel=1e-6)


def test_a_batch_is_split_into_the_parts_that_devices_have_samples_for() -> None:
    run = small(train=LoopConfig(batch=8, accumulate=4))
    planner = Planner(run, subject(run))
    parts = {(layout.tensor, layout.accumulate) for layout in planner.layouts(4)}
    assert parts == {(1, 2), (2, 4)}  # 2 samples a device; 4 for two devices, as this model has 2 heads
    assert planner.suggest(4, 80.0).devices == 4


def test_recomputation_keeps_less() -> None:
    kept = [
        Planner(run, subject(run)).activations
        for run in (small(train=LoopConfig(batch=8, remat=remat)) for remat in ("none", "dots", "full"))
    ]
    assert kept[0] > 1.5 * kept[1] > 1.5 * kept[2]


def test_a_plan_that_does_not_fit_says_so() -> None:
    run = small(clip=(3, 8, 8))
    about = subject(run)
    planner = Planner(run, about)
    planner.activations = 1e15
    assert not planner.suggest(8, 80).fits(80)
    assert "fits" in plan_text(run, about, counts=(8,))


def test_flop_of_a_clip_are_those_of_its_program() -> None:
    config = dataclasses.replace(MODEL, width=64, inject_layers=(0, 1, 2))  # a cond counts its dearest branch
    model = jax.eval_shape(lambda: CausalDiT(config, rngs=nnx.Rngs(0)))
    shapes = {
        "latent": (1, 6, 8, 8, 4), "t": (1, 6), "text": (1, 4, 6), "audio": (1, 1, 2, 5, 24),
        "ref": (1, 1, 8, 8, 4),
    }  # fmt: skip
    inputs = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    def forward(model: CausalDiT, x: dict[str, jax.Array]) -> jax.Array:
        return train_forward(
            model, x["latent"], x["t"], text_BSE=x["text"], audio=x["audio"], ref_B1HWC=x["ref"]
        )

    heard = count_flops(lambda model, x: encode_audio(model.audio_encoder, x["audio"]), model, inputs)
    counted = count_flops(forward, model, inputs) - heard
    assert clip_flops(config, 6, 8, 8) == pytest.approx(counted, rel=0.01)
    assert step_flops(100.0, lora=False) == 300.0
