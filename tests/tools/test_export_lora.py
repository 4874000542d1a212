"""The adapters of a run as a file: what a conversion with it computes is what the run computes."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lavatar_jax.checkpoints.conversion import Task, convert_folder
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.lora_keys import read_lora
from lavatar_jax.checkpoints.orbax_store import restore_component
from lavatar_jax.cli import run as exit_code
from lavatar_jax.errors import UserError
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.dit_forward import train_forward
from lavatar_jax.training.decoder import load_dit
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.weights import LoraConfig, initial_weights
from tests import published
from tests.published import Published, write_published
from tests.tiny import normal
from tests.training.finished_run import random_adapters, write_run
from tests.training.toy_run import mesh_of
from tools.export_lora import export_lora, main
from tools.pth import PickledTensors

MODEL = published.DIT_CONFIG
LORA = LoraConfig(rank=2, alpha=5.0, base="float32")  # not the factor of the published file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def run(tmp_path: Path) -> DiTRun:
    """Adapters on a model folder that is not there yet."""
    run = DiTRun(
        out=str(tmp_path / "run"), init=str(tmp_path / "base"), model=MODEL, data=LatentsConfig(),
        loss=ForcingConfig(), lora=LORA, train=LoopConfig(),
    )  # fmt: skip
    write_run(run, random_adapters(run.make, LORA))
    return run


def convert(source: Published, out: Path, **options) -> CausalDiT:
    convert_folder(Task(wan=source.wan, out=out, **options), PickledTensors)
    return restore_component(out, "dit", jax.eval_shape(lambda: CausalDiT(MODEL, rngs=nnx.Rngs(0))))


@jax.jit
def forward(model: CausalDiT) -> jax.Array:
    latent, channels = normal(1, 1, 3, 4, 4, MODEL.latent_channels), MODEL.latent_channels
    return train_forward(
        model,
        latent,
        np.linspace(100, 900, 3, dtype=np.float32)[None],
        text_BSE=normal(3, 1, 4, MODEL.text_dim),
        audio=normal(4, 1, 1, MODEL.audio_layers, MODEL.audio_dim, 12),
        ref_B1HWC=normal(2, 1, 1, 4, 4, channels),
    )


def test_a_conversion_with_the_file_computes_what_the_run_does(
    source: Published, run: DiTRun, tmp_path: Path
) -> None:
    base = convert(source, Path(run.init or ""), dtype="fp32")
    file = tmp_path / "files" / "mine.safetensors"
    assert exit_code(lambda: main([run.out, "--out", str(file)])) == 0
    keys = {key.replace(".default", "") for key in load_file(file)}
    assert keys - {key for key in keys if key.endswith(".alpha")} == {
        key.replace(".default", "") for key in source.adapters
    }
    assert {(pair.rank, pair.alpha) for pair in read_lora(load_file(file)).values()} == {(2, 1.0)}, (
        "the factor of the released loader"
    )

    merged = load_dit(run.out)
    found = convert(source, tmp_path / "model", lora=file, dtype="fp32")
    for name, value in param_paths(merged).items():
        np.testing.assert_allclose(param_paths(found)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    want = forward(merged)
    np.testing.assert_allclose(forward(found), want, rtol=1e-3, atol=1e-3 * float(np.abs(want).max()))
    assert float(np.abs(forward(base) - want).mean()) > 0.05 * float(np.abs(want).mean())


def test_a_run_starts_on_a_folder_with_8_bit_weights(source: Published, run: DiTRun) -> None:
    stored = convert(source, Path(run.init or ""), dtype="fp8")
    frozen = initial_weights(run.make, mesh_of(1, 2, 1), init=run.init, seed=0, adapters=LORA).frozen
    weight = stored.blocks.ffn.inner.weight.get_value()
    np.testing.assert_array_equal(frozen["blocks.ffn.inner.weight.base"], weight.dequantize())


def test_what_is_no_run_with_adapters_is_refused(run: DiTRun, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    with pytest.raises(UserError, match=r"is not a run of stage 1 or 2: .*config\.json is missing"):
        export_lora(tmp_path, out)
    config = Path(run.out) / "config.json"
    for change, message in (
        ({"lora": dataclasses.asdict(LoraConfig(rank=4))}, r"is not of the model of its config\.json"),
        ({"lora": dataclasses.asdict(LoraConfig())}, r"trained all weights, no adapters"),
    ):
        config.write_text(json.dumps(dataclasses.asdict(run) | change))
        with pytest.raises(UserError, match=message):
            export_lora(Path(run.out), out)
    assert not out.exists()
    out.touch()
    with pytest.raises(UserError, match="exists already"):
        export_lora(Path(run.out), out)
