"""What a run starts from: every weight of the model that `init` names, or a refusal."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax import lora, quant
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.errors import UserError
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import make_vae
from lavatar_jax.training import weights
from lavatar_jax.training.latents import load_vae
from lavatar_jax.training.weights import LoraConfig, abstract_weights, fresh_adapters, initial_weights
from tests.tiny import random_dit, tiny_config
from tests.training.toy_run import mesh_of

CONFIG = tiny_config()


def make(rngs: nnx.Rngs) -> CausalDiT:
    return CausalDiT(CONFIG, rngs=rngs)


def folder_with(dit: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A converted model folder whose transformer is `dit`."""
    (folder / "dit").mkdir()
    monkeypatch.setattr(weights, "restore_component", lambda *arguments: dit)
    return str(folder)


def with_adapters(dit: CausalDiT) -> CausalDiT:
    adapters, rest = lora.split_adapters(lora.add_adapters(dit, jax.random.key(0), rank=2))
    return lora.join_adapters({name: jnp.full_like(x, 0.1) for name, x in adapters.items()}, rest)


def test_a_vae_starts_from_that_of_a_model_folder():
    shipped = load_model_folder("tiny").vae
    config, vae = load_vae("tiny")
    assert (set(config.latent_mean), set(config.latent_std)) == ({0.0}, {1.0})
    started = initial_weights(
        lambda rngs: make_vae(config, rngs=rngs), mesh_of(1, 1, 1), init="tiny", component="vae", seed=0
    ).params
    for name, value in param_paths(shipped).items():
        np.testing.assert_array_equal(param_paths(vae)[name], value)
        np.testing.assert_array_equal(started[name], value)
    with pytest.raises(UserError, match="neither a run of stage 0 nor a model folder"):
        load_vae("no such place")


@pytest.mark.parametrize("per_channel", [False, True])
def test_8_bit_weights_are_the_numbers_that_they_stand_for(
    per_channel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quantised = quant.quantize(with_adapters(random_dit(CONFIG)), per_channel=per_channel)
    init = folder_with(quantised, tmp_path, monkeypatch)
    found = initial_weights(make, mesh_of(1, 1, 1), init=init, seed=0).params
    assert found.keys() == param_paths(random_dit(CONFIG)).keys()
    for name, exact in param_paths(lora.merge(with_adapters(random_dit(CONFIG)))).items():
        assert found[name].dtype == jnp.float32
        far = 0.04 if quant.is_quantized(name) else 0.0  # e4m3 has 3 bits after the first
        assert np.linalg.norm(found[name] - exact) <= far * np.linalg.norm(exact), name


def test_adapters_start_on_8_bit_weights_that_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quantised = quant.quantize(random_dit(CONFIG))
    init = folder_with(quantised, tmp_path, monkeypatch)
    adapters = LoraConfig(rank=2, base="float32")
    frozen = initial_weights(make, mesh_of(1, 2, 1), init=init, seed=0, adapters=adapters).frozen
    name = "blocks.ffn.inner.weight"
    expected = quantised.blocks.ffn.inner.weight.get_value().dequantize()
    np.testing.assert_array_equal(frozen[f"{name}.base"], expected)
    assert frozen[f"{name}.base"].addressable_shards[0].data.size * 2 == expected.size


def test_a_model_without_some_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    init = folder_with({"head": random_dit(CONFIG).head}, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"holds weights of another model \(\d+ differences, first: aud"):
        initial_weights(make, mesh_of(1, 1, 1), init=init, seed=0)


def test_fresh_adapters_are_those_of_a_run_without_its_base():
    adapters = LoraConfig(rank=2, alpha=4.0)
    expected = initial_weights(make, mesh_of(1, 1, 1), init=None, seed=3, adapters=adapters).params
    found = fresh_adapters(make, mesh_of(1, 2, 1), seed=3, adapters=adapters)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name])


def test_adapters_of_a_run_say_the_same_at_another_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ours = LoraConfig(rank=2, alpha=4.0)
    stored = {name: jnp.ones(leaf.shape) for name, leaf in abstract_weights(make, ours).params.items()}
    monkeypatch.setattr(weights, "read_average", lambda run: stored)
    (tmp_path / "config.json").write_text('{"lora": {"rank": 2, "alpha": 12.0}}')
    adapters = dataclasses.replace(ours, init=str(tmp_path))
    params = initial_weights(make, mesh_of(1, 1, 1), init=None, seed=0, adapters=adapters).params
    for name, value in params.items():
        np.testing.assert_array_equal(value, 3.0 if name.endswith(".b") else 1.0)
