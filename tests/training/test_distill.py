"""Stage 2 as a whole: it streams as inference does, learns in turns, resumes, and refuses what cannot be."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lavatar_jax.checkpoints.runs import flatten_names, read_average
from lavatar_jax.checkpoints.store import save_params
from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.data.motion import MANNERS
from lavatar_jax.data.negative_prompt import write_negative
from lavatar_jax.data.shards import ShardWriter, stored_records
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.flops import clip_flops
from lavatar_jax.parallel import MeshConfig, train_mesh
from lavatar_jax.training import distill_step, samples, self_forcing
from lavatar_jax.training.distill import (
    DistillRun,
    make_roles,
    make_step,
    sample_flops,
    sampler_rollout,
    starting_weights,
    train_distill,
)
from lavatar_jax.training.distill_state import DistillState, create_distill_state
from lavatar_jax.training.distill_step import DistillConfig
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig, Reward
from lavatar_jax.training.latents import LatentsConfig, latent_statistics, open_latents
from lavatar_jax.training.logs import LOG, read_log
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.ode_init import OdeRun, train_ode
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.report import SAMPLES
from lavatar_jax.training.run import Run, check_continued, write_config
from lavatar_jax.training.samples import SamplesConfig, stream_record
from lavatar_jax.training.scores import ScoreConfig
from lavatar_jax.training.self_forcing import SelfForcingConfig
from lavatar_jax.training.state import split_model
from lavatar_jax.training.weights import LoraConfig, abstract_weights
from tests.tiny import random_dit
from tests.training.finished_run import write_run
from tests.training.painted import PaintedVAE
from tools.package_model import SAMPLING as SHIPPED_SAMPLING
from train import load_config

MODEL = DiTConfig(
    layers=2, width=16, heads=2, ffn_width=16, latent_channels=4, patch=2, text_dim=4, text_len=3, freq_dim=8,
    audio_dim=6, audio_layers=1, audio_tokens=2, inject_layers=(0,), block_frames=1, use_motion=False,
    use_pose=False,
)  # fmt: skip
SIZE, CLIPS = (3, 4, 4), 6
SAMPLING = SamplingConfig(steps=2, motion=False, adapt_sink_after=None, sink_distance=24, ring_blocks=2)


def contrast(run: DistillRun, scale: float = 1.0) -> Reward:
    """A reward of the simplest kind."""
    return Reward(lambda scale, clip, batch: scale * jnp.std(clip, axis=(1, 2, 3, 4)), jnp.float32(scale))


def broken(run: DistillRun) -> Reward:
    """A reward that is not a number."""
    return contrast(run, float("nan"))


def make_run(folder: Path) -> DistillRun:
    """A run on clips of random numbers, from random weights in a model folder."""
    random = np.random.default_rng(0)
    with ShardWriter(folder / "latents") as writer:
        for index in range(CLIPS):
            latent = random.normal(size=(*SIZE, 4))
            record = {
                "id": str(index),
                "caption": MANNERS[index % len(MANNERS)].caption,
                "latent": latent.astype(np.float16),
                "reference": latent[:1].astype(np.float16),
                "spread": np.full(4, 0.1, np.float16),
                "audio": random.normal(size=(1, 6, 4 * SIZE[0])).astype(np.float16),
                "mouth": np.full(SIZE[1:], 255, np.uint8),
                "pose": latent.astype(np.float16),  # the model takes none
            }
            writer.write(record)
        writer.flush()
        mean, std = latent_statistics(stored_records(folder / "latents", writer.rows))
        writer.finish(mean=mean, std=std, encoder={})
    write_negative(folder / "latents", "", random.normal(size=(2, 4)))
    (folder / "model").mkdir()
    save_params(folder / "model" / "dit.safetensors", random_dit(MODEL), np.float32)
    return DistillRun(
        out=str(folder / "out"),
        init=str(folder / "model"),
        model=MODEL,
        data=LatentsConfig(folder=str(folder / "latents"), clips=CLIPS, text_len=3, text_dim=4),
        sampling=SAMPLING,
        rollout=SelfForcingConfig(transition="euler", shift=3.0),
        score=ScoreConfig(kind="causal", without_audio="other", without_text="negative"),
        loss=DMDConfig(shift=3.0, guidance=0.5),
        dyna=DynaConfig(hybrid=0.5, alpha=0.5, rewards=((f"{__name__}:contrast", 1.0),)),
        distill=DistillConfig(critic_rate=1e-2, update_ratio=2, regression=0.5, mouth_weight=2.0, run_in=1),
        optim=OptimConfig(kind="adamw"),
        critic_optim=OptimConfig(kind="adamw"),
        train=LoopConfig(steps=4, learning_rate=1e-2, batch=4, ema_decay=0.9, log_every=1),
    )


@pytest.fixture
def run(tmp_path: Path) -> DistillRun:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DistillRun, DistillState]:
    """A run from its beginning to its end, on one device."""
    run = make_run(tmp_path_factory.mktemp("trained"))
    return run, train_distill(run)


def logged(run: DistillRun) -> list[dict[str, float]]:
    """The lines of the steps, without the times."""
    lines = [json.loads(line) for line in (Path(run.out) / "log.jsonl").read_text().splitlines()]
    clock = ("time", "seconds", "samples_per_second")
    return [{name: x for name, x in line.items() if name not in clock} for line in lines if "step" in line]


def test_student_and_critic_learn_in_turns_and_the_average_is_a_model(
    trained: tuple[DistillRun, DistillState],
) -> None:
    before, _ = split_model(random_dit(MODEL))
    run, state = trained
    assert (int(state.step), int(state.updates)) == (4, 2)
    for params in (state.params, state.critic):
        moved = [name for name in before if np.abs(params[name] - before[name]).max() > 1e-4]
        assert {name.split(".")[0] for name in moved} >= {"blocks", "injectors", "head", "audio_encoder"}
    assert read_average(Path(run.out)).keys() == before.keys()
    lines = logged(run)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[-1]["dmd_gradient_norm"] > 0
    np.testing.assert_allclose(state.rewards.weight, 1 - 0.98**2, rtol=1e-4)


def test_a_student_goes_on_exactly_between_its_turns(
    trained: tuple[DistillRun, DistillState], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = trained
    run = dataclasses.replace(run, out=str(tmp_path / "parts"))
    stopped = train_distill(run, stop_at=3)
    assert "clips of 3 latent frames, the config is made for 12" in capsys.readouterr().err
    assert (int(stopped.step), int(stopped.updates)) == (3, 1)
    state = train_distill(run)
    wanted = flatten_names(dataclasses.replace(whole, seconds=state.seconds))
    for name, value in flatten_names(state).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    assert logged(run) == logged(trained[0])


def test_two_devices_make_in_parts_and_without_replay_the_losses_of_one(
    trained: tuple[DistillRun, DistillState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one device makes them of the whole batch with replay."""
    asked: list[bool] = []
    monkeypatch.setattr(
        distill_step,
        "gradient_of_rollout",
        lambda *given: asked.append(True) or self_forcing.gradient_of_rollout(*given),
    )
    run = dataclasses.replace(
        trained[0],
        out=str(tmp_path / "split"),
        mesh=MeshConfig(fsdp=2),
        train=dataclasses.replace(trained[0].train, accumulate=2),
        rollout=dataclasses.replace(trained[0].rollout, replay=False),
    )
    state = train_distill(run)
    assert asked
    for tree in (state.params, state.critic, state.average):
        leaf = tree["blocks.ffn.inner.weight"]
        assert leaf.addressable_shards[0].data.size * 2 == leaf.size
    for found, expected in zip(logged(run), logged(trained[0]), strict=True):
        assert found.keys() == expected.keys()
        # Adam makes whole steps of gradients that are almost nothing, and so of what rounding makes of them.
        near = 1e-5 if expected["step"] == 1 else 2e-3
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=near, abs=1e-6), name


def test_a_student_without_finite_rewards_stays_as_it_was_and_the_step_is_named(run: DistillRun) -> None:
    before, _ = split_model(random_dit(MODEL))
    run = dataclasses.replace(run, dyna=dataclasses.replace(run.dyna, rewards=((f"{__name__}:broken", 1.0),)))
    state = train_distill(run)
    assert (int(state.step), int(state.updates)) == (4, 0)
    for params in (state.params, state.average):
        assert all(np.array_equal(params[name], before[name]) for name in before)
    assert any(np.abs(state.critic[name] - before[name]).max() > 1e-4 for name in before)
    np.testing.assert_array_equal(state.rewards.mean, 0.0)
    np.testing.assert_array_equal(state.rewards.weight, 0.0)
    lines = [json.loads(line) for line in (Path(run.out) / "log.jsonl").read_text().splitlines()]
    bad = [line["bad_step"] for line in lines if "bad_step" in line]
    assert len(bad) == 2, "every student's turn is a bad step"
    assert all("student's gradient norm" in step["message"] for step in bad)


@pytest.mark.parametrize("stage", ["distill", "ode"])
def test_the_report_shows_what_the_student_says(
    run: DistillRun, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "load_vae", lambda place: (VAEConfig(), PaintedVAE()))
    train = dataclasses.replace(run.train, steps=2)
    run = dataclasses.replace(run, samples=SamplesConfig(records=2), train=train)
    shared = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    state: Any = train_distill(run) if stage == "distill" else train_ode(OdeRun(**shared))
    shown = sorted((Path(run.out) / SAMPLES).rglob("*.webp"))
    assert [path.name for path in shown] == ["4.webp", "5.webp"] * (len(shown) // 2)
    assert shown

    # The right half is the averaged student's, streamed as it will be sampled; and it is what was measured.
    _, merge = split_model(random_dit(MODEL))
    source = open_latents(run.data, held_out=2)
    model, rows = merge(state.average), [source[number] for number in (4, 5)]
    made = [np.asarray(stream_record(model, row, run.sampling)) for row in rows]
    truth = [row["latent"] for row in rows]
    evaluated = [line["evaluation"] for line in read_log(Path(run.out) / LOG) if "evaluation" in line][-1]
    errors = [np.mean((a - b) ** 2) for a, b in zip(made, truth, strict=True)]
    motion = [a.std(axis=0).mean() / b.std(axis=0).mean() for a, b in zip(made, truth, strict=True)]
    assert evaluated["held_out_error"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert evaluated["held_out_motion"] == pytest.approx(np.mean(motion), rel=1e-3)
    assert evaluated.get("held_out_contrast") == (
        pytest.approx(np.mean([np.std(a) for a in made]), rel=1e-3) if stage == "distill" else None
    )
    latent = made[1]
    wanted = (latent[-1, ..., :3] * source.std[:3] + source.mean[:3]) / 10.0
    wanted = np.clip(wanted.repeat(8, axis=0).repeat(8, axis=1) * 127.5 + 128.0, 0, 255)
    with Image.open(shown[-1]) as picture:
        picture.seek(picture.n_frames - 1)
        right = np.asarray(picture.convert("RGB"), np.float32)[1::2, 1::2][:, 32:]
    assert np.abs(right - wanted)[4::8, 4::8].mean() < 8  # WebP is not exact


def test_a_student_that_never_learns_is_refused(run: DistillRun) -> None:
    never = dataclasses.replace(run, distill=dataclasses.replace(run.distill, update_ratio=0))
    with pytest.raises(UserError, match=r"--distill\.update-ratio must be at least 1, not 0"):
        train_distill(never)


def test_another_teacher_than_in_the_beginning_is_refused(run: DistillRun, tmp_path: Path) -> None:
    """A run of the same name, that was trained again or has gone on."""
    weights, _ = split_model(random_dit(MODEL))
    first = Run(out=str(tmp_path / "teacher"), train=LoopConfig(steps=1))
    run = dataclasses.replace(run, teacher=str(write_run(first, weights)))
    train_distill(run, stop_at=1)
    shutil.rmtree(first.out)
    write_run(first, weights)
    before = (Path(run.out) / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"began with .*teacher as it was then; --teacher .* another"):
        train_distill(run)
    assert (Path(run.out) / "config.json").read_bytes() == before


def test_another_model_than_in_the_beginning_is_refused(run: DistillRun, tmp_path: Path) -> None:
    """Of model folders, and of a run and a model folder, the names count: a folder may be moved."""
    write_config(run)
    check_continued(run)
    check_continued(dataclasses.replace(run, init=str(tmp_path / "moved" / "model")))
    with pytest.raises(UserError, match=r"began with .*model as it was then; --init other is another model"):
        check_continued(dataclasses.replace(run, init="other"))
    weights, _ = split_model(random_dit(MODEL))
    trained = write_run(Run(out=str(tmp_path / "stage_1"), train=LoopConfig(steps=1)), weights)
    with pytest.raises(UserError, match=r"--init .*stage_1 is another model"):
        check_continued(dataclasses.replace(run, init=str(trained)))
    taught = dataclasses.replace(run, teacher=str(trained))
    with pytest.raises(UserError, match="began with no --teacher: do so again"):
        check_continued(taught)
    write_config(taught)
    check_continued(taught)
    with pytest.raises(UserError, match=r"began with --teacher .*stage_1: do so again"):
        check_continued(run)
    with pytest.raises(UserError, match=r"--teacher tiny_forcing is another model"):
        check_continued(dataclasses.replace(run, teacher="tiny_forcing"))


def test_another_negative_prompt_than_in_the_beginning_is_refused(run: DistillRun) -> None:
    write_config(run)
    check_continued(run)
    write_negative(Path(run.data.folder), "", np.ones((2, 4), np.float16))  # encoded on another device, say
    check_continued(run)
    write_negative(Path(run.data.folder), "blurred", np.ones((2, 4), np.float16))
    with pytest.raises(
        UserError, match="began with the negative prompt '', but 'blurred' is beside its records"
    ):
        check_continued(run)
    check_continued(dataclasses.replace(run, score=dataclasses.replace(run.score, without_text="zeros")))


def test_another_alpha_than_in_the_beginning_is_refused(run: DistillRun) -> None:
    """The adapters of the checkpoint would count at another strength."""
    began = dataclasses.replace(run, lora=LoraConfig(rank=2, alpha=4.0))
    write_config(began)
    check_continued(began)
    with pytest.raises(UserError, match=r"began with --lora\.alpha 4, by which its adapters count"):
        check_continued(dataclasses.replace(run, lora=LoraConfig(rank=2)))


def test_weights_of_another_model_are_refused(run: DistillRun) -> None:
    with pytest.raises(UserError, match="does not fit"):
        train_distill(dataclasses.replace(run, model=dataclasses.replace(MODEL, input_skip=True)))


def test_with_adapters_the_weights_of_three_roles_exist_once(run: DistillRun) -> None:
    """The state holds two sets of adapters; what is frozen is one base, which is the teacher itself."""
    run = dataclasses.replace(run, lora=LoraConfig(rank=2, base="float32"))
    mesh = train_mesh(run.mesh)
    student, critic, frozen = starting_weights(run, mesh)
    assert student.keys() == critic.keys()
    assert all(name.endswith((".a", ".b")) for name in student)
    plain, _ = split_model(random_dit(MODEL))
    assert {name.removesuffix(".base") for name in frozen} == plain.keys()
    roles = make_roles(run)
    base = {leaf.unsafe_buffer_pointer() for leaf in frozen.values()}
    held = [
        {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)} & base
        for model in (roles.teacher(frozen), roles.student(student, frozen), roles.critic(critic, frozen))
    ]
    assert held == [base] * 3  # the very arrays, not copies

    _, optimizers = make_step(run, student, [])
    state = jax.eval_shape(
        lambda a, b: create_distill_state(a, b, optimizers, steps=2, rewards=0, seed=0), student, critic
    )
    # Parameters, average and two moments of the student, parameters and two moments of the critic.
    size = sum(leaf.size for leaf in student.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 7 * size + 100


def test_the_teacher_cannot_be_another_than_the_base_of_adapters(run: DistillRun) -> None:
    run = dataclasses.replace(run, lora=LoraConfig(rank=2, base="float32"), teacher=run.init)
    with pytest.raises(UserError, match="leave --teacher out"):
        starting_weights(run, train_mesh(run.mesh))


def test_a_student_is_not_taken_for_the_teacher(run: DistillRun, tmp_path: Path) -> None:
    shared = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    student = OdeRun(**{**shared, "out": str(tmp_path / "ode")})
    moved = {name: 2 * value for name, value in split_model(random_dit(MODEL))[0].items()}
    write_run(student, moved)
    run = dataclasses.replace(run, init=student.out)
    with pytest.raises(UserError, match=rf"is a student, .*: --teacher {run.data.folder[:-7]}model$"):
        starting_weights(run, train_mesh(run.mesh))
    with pytest.raises(UserError, match=r"is a student, .* --lora\.init"):
        starting_weights(dataclasses.replace(run, lora=LoraConfig(rank=2)), train_mesh(run.mesh))
    run = dataclasses.replace(run, teacher=student.init)
    params, critic, teacher = starting_weights(run, train_mesh(run.mesh))
    for name, value in moved.items():
        np.testing.assert_array_equal(params[name], value)
        np.testing.assert_array_equal(2 * teacher[name], value)
        np.testing.assert_array_equal(critic[name], teacher[name])


def load_run(name: str) -> DistillRun:
    return load_config(str(Path(__file__).parents[2] / "configs" / f"{name}.py"))


def test_the_tiny_student_streams_as_the_small_model_is_packaged() -> None:
    assert load_run("tiny_distill").sampling == SHIPPED_SAMPLING


def test_a_step_of_the_full_size_run_can_be_traced() -> None:
    """Three roles of 14B on one base, 84 frames of 720 x 400, two parts of two: shapes and dtypes only."""
    run = load_run("wan14b_distill")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=2))
    weights = abstract_weights(run.make, run.lora)
    assert sum(leaf.size for leaf in weights.frozen.values()) == 16_295_755_609
    step_fn, optimizers = make_step(run, weights.params, [])
    state = jax.eval_shape(
        lambda a, b: create_distill_state(a, b, optimizers, steps=run.sampling.steps, rewards=0, seed=0),
        weights.params,
        weights.params,
    )
    frames, height, width = run.clip
    model = run.model

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((4, *sizes), jnp.float32)

    batch = {
        "latent": shape(frames, height, width, 16),
        "reference": shape(1, height, width, 16),
        "audio": shape(1, model.audio_layers, model.audio_dim, 4 * frames),
        "text": shape(model.text_len, model.text_dim),
        "negative_text": shape(model.text_len, model.text_dim),
        "mouth": shape(height, width),
    }
    frozen = {"params": weights.frozen, "rewards": []}
    after, metrics = jax.eval_shape(step_fn, state, frozen, batch, jnp.float32(1e-5))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(leaf.dtype == jnp.float32 for leaf in after.params.values())
    assert metrics["loss"].shape == ()


def test_flops_of_a_step_count_turns_exits_and_judges() -> None:
    run = load_run("wan14b_distill")
    whole = sample_flops(run, run.clip)
    # Four critic steps in five have a rollout and a critic only: with rare turns a step costs less.
    rare = dataclasses.replace(run, distill=dataclasses.replace(run.distill, update_ratio=10**6))
    early = dataclasses.replace(run, rollout=dataclasses.replace(run.rollout, exit_weights=(1, 0, 0, 0)))
    plain = dataclasses.replace(run, loss=dataclasses.replace(run.loss, guidance=0.0))
    prompted = dataclasses.replace(run, loss=dataclasses.replace(run.loss, text_guidance=1.0))
    clip = clip_flops(run.model, *run.clip, causal=False)
    assert whole - sample_flops(plain, run.clip) == pytest.approx(clip / 5)
    assert sample_flops(prompted, run.clip) - whole == pytest.approx(clip / 5)
    assert sample_flops(rare, run.clip) < 0.85 * whole
    assert sample_flops(early, run.clip) < whole


def test_exits_that_do_not_fit_the_sampler_are_a_clear_error() -> None:
    run = load_run("tiny_distill")
    fewer = dataclasses.replace(run.sampling, steps=2)
    early = dataclasses.replace(run.rollout, exit_weights=(1.0, 1.0, 1.0, 0.0))
    with pytest.raises(UserError, match="sampler's 2 steps"):
        sampler_rollout(early, fewer)
    assert sampler_rollout(dataclasses.replace(run.rollout, exit_weights=(1.0, 0.0)), fewer).sigmas.shape == (
        3,
    )
