"""Options and records that no run can have are told in one line, before anything is written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import train
from lavatar_jax.cli import run
from lavatar_jax.config import DiTConfig
from lavatar_jax.errors import UserError
from lavatar_jax.training.checks import check_records
from lavatar_jax.training.optim import OptimConfig, clip_by_norm, make_optimizer
from lavatar_jax.training.weights import LoraConfig
from tests.training.toy_run import begin, mesh_of

ROOT = Path(__file__).parents[2]
REWARD = ("--dyna.rewards", "lavatar_jax.training.rewards:mouth_sync", "1")

WRONG: list[tuple[str, tuple[str, ...], str]] = [
    ("README.md", (), "README.md is no Python file"),
    ("configs/tiny_dit.py", ("--train.bach", "4"), "--train.bach"),
    ("configs/tiny_dit.py", ("--train.batch", "many"), "--train.batch"),
    (
        "configs/tiny_dit.py",
        ("--model.width", "270"),
        "width 270 must be a multiple of 4, for the audio encoder",
    ),
    ("configs/tiny_dit.py", ("--plan", "--plan-gpu", "h101"), "h101: unknown device; known: 4090"),
    (
        "configs/tiny_dit.py",
        ("--plan-devices", "0"),
        "--plan-devices 0: give numbers of devices",
    ),
    ("configs/tiny_distill.py", ("--critic-optim.schedule", "constant"), "--critic-optim.schedule constant"),
    ("configs/tiny_distill.py", ("--plan", "--rollout.no-replay"), "leave --rollout.no-replay out"),
    ("configs/tiny_dit.py", ("--checkpoint.every", "0"), "--checkpoint.every 0: give a number of steps"),
    ("configs/tiny_dit.py", ("--train.batch", "0"), "--train.batch must be more than 0, not 0"),
    ("configs/tiny_dit.py", ("--train.batch", "0", "--plan"), "--train.batch must be more than 0, not 0"),
    ("configs/tiny_dit.py", ("--train.ema-decay", "1.5"), "--train.ema-decay must be from 0 to below 1"),
    ("configs/tiny_dit.py", ("--train.spike", "-1"), "--train.spike must not be negative"),
    ("configs/tiny_dit.py", ("--optim.clip", "-1"), "--optim.clip must be more than 0, or 0"),
    ("configs/tiny_vae.py", ("--checkpoint.keep", "0"), "--checkpoint.keep 0: a run keeps"),
    ("configs/tiny_dit.py", ("--mesh.fsdp", "0"), "--mesh.fsdp 0: give the number of devices"),
    ("configs/tiny_distill.py", ("--train.batch", "1"), "--score.without-audio other leads away"),
    (
        "configs/tiny_ode.py",
        ("--train.batch", "4", "--train.accumulate", "4"),
        "--train.batch 4 has none in each of 4 parts",
    ),
    (
        "configs/tiny_distill.py",
        ("--train.batch", "1", "--score.without-audio", "zeros"),
        "--distill.run-in 3 takes blocks of another clip",
    ),
    ("configs/tiny_distill.py", ("--dyna.alpha", "0.5"), "--dyna.alpha and --dyna.rewards go together"),
    ("configs/tiny_distill.py", REWARD, "--dyna.alpha and --dyna.rewards go together"),
    ("configs/tiny_distill.py", ("--critic-optim.clip", "-1"), "--critic-optim.clip must be"),
    ("configs/tiny_distill.py", ("--rollout.cache", "context"), "--rollout.cache follows from"),
    ("configs/tiny_ode.py", ("--rollout.steps", "1000", "500"), "--rollout.steps follows from"),
    (
        "configs/tiny_distill.py",
        ("--rollout.no-same-exit", "--sampling.history", "clean", "--loss.below-exit"),
        "blocks that leave at different steps",
    ),
]


@pytest.mark.parametrize(("config", "options", "complaint"), WRONG)
def test_mistakes_cost_one_line(
    config: str, options: tuple[str, ...], complaint: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(lambda: train.main([str(ROOT / config), *options])) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert complaint in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("targets", ["nothing", "("])
def test_adapters_of_no_weight_are_refused(targets: str) -> None:
    with pytest.raises(UserError, match=rf"--lora\.targets {targets.replace('(', '[(]')}: "):
        begin(mesh_of(1, 1, 1), dit=True, lora=LoraConfig(rank=2, targets=targets))


def source(**shapes: tuple[int, ...]) -> Any:
    """Records of a small transformer."""
    fitting = {"latent": (12, 16, 16, 16), "audio": (1, 24, 48)}
    return SimpleNamespace(
        folder="runs/latents", text_shape=(16, 64), buckets=[SimpleNamespace(shapes={**fitting, **shapes})]
    )


MODEL = DiTConfig(
    layers=1, inject_layers=(0,), width=16, heads=2, ffn_width=24, latent_channels=16, patch=4,
    text_dim=64, text_len=16, audio_dim=24, audio_layers=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ({"latent": (12, 16, 16, 8)}, "have 8 latent channels, the model takes 16"),
        ({"audio": (25, 24, 48)}, "have 25 layers of audio features, the model takes 1"),
        ({"audio": (1, 1024, 48)}, "have 1024 audio features, the model takes 24"),
        ({"latent": (13, 16, 16, 16)}, "have 13 latent frames, which are no whole blocks of 3"),
        ({"latent": (12, 16, 18, 16)}, "have 16 x 18 latents, the model's patches are 4 x 4"),
    ],
)
def test_records_of_another_model_are_refused(shapes: dict[str, tuple[int, ...]], complaint: str) -> None:
    check_records(source(), MODEL)
    with pytest.raises(UserError, match=complaint):
        check_records(source(**shapes), MODEL)


def test_texts_have_one_length() -> None:
    with pytest.raises(UserError, match=r"16 and 64, the model takes 512 and 64"):
        check_records(source(), DiTConfig(**{**vars(MODEL), "text_len": 512}))


def test_a_clip_of_0_clips_nothing() -> None:
    gradient = {"a": np.array([3.0, 4.0])}
    np.testing.assert_allclose(clip_by_norm(gradient, jax.numpy.float32(5), 1.0)["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(clip_by_norm(gradient, jax.numpy.float32(5), 0.0)["a"], [3.0, 4.0])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_weights_without_a_gradient_do_not_decay(kind: Any) -> None:
    """An encoder stays what it is while its decoder learns."""
    params = {"encoder.weight": jax.numpy.ones((2, 3)), "decoder.weight": jax.numpy.ones((2, 3))}
    nothing = jax.tree.map(jax.numpy.zeros_like, params)
    for still, decays in (((), True), (("encoder.",), False)):
        optimizer = make_optimizer(params, weight_decay=0.1, config=OptimConfig(kind=kind), still=still)
        updates, _ = optimizer.update(nothing, optimizer.init(params), params)
        assert bool(np.any(np.asarray(updates["encoder.weight"]))) == decays
        np.testing.assert_allclose(updates["decoder.weight"], -0.1, rtol=1e-5)
