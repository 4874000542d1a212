"""The model of capacity, and the tool around it."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.cli import run
from lavatar_jax.config import DiTConfig, VAEConfig
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.capacity import (
    DECODER_ATTENTION,
    DECODER_CACHE,
    DECODER_FLOP,
    Setup,
    decoder_memory,
    dit_for,
    front_memory,
    make_plan,
    needs,
)
from lavatar_jax.evaluation.devices import GPUS, PAPER, Calibration, from_measurement
from lavatar_jax.evaluation.flops import StreamShape, count_flops, layer_parameters
from lavatar_jax.evaluation.paper import against_paper
from lavatar_jax.models.vae import make_vae
from tools import plan as tool
from tools.bench_step import decoder_arguments

ROOT = Path(__file__).parents[2]
H100 = GPUS["h100"]
FIVE = Setup(config=DiTConfig(), height=720, width=400, ring=(H100,) * 4, decoder=H100)


@pytest.mark.parametrize("size", [(720, 400), (704, 384)])
def test_within_15_percent_of_the_paper(size: tuple[int, int]) -> None:
    rows = against_paper(*size)
    assert {row.value for row, _ in rows} >= {36.0, 45.2, 18.0, 1.21}
    for row, value in rows:
        assert value == pytest.approx(row.value, rel=0.15), row.name


def test_the_fitted_row_is_met() -> None:
    [(row, value)] = [(row, value) for row, value in against_paper() if row.role == "fitted"]
    assert value == pytest.approx(row.value, rel=0.01)


def test_arithmetic_of_the_decoder_is_that_of_the_vae() -> None:
    height, width = 12, 10
    vae = jax.eval_shape(lambda: make_vae(VAEConfig(), rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda vae: vae.init_decode_cache(1, height, width), vae)
    latent = jax.ShapeDtypeStruct((1, 3, height, width, 16), jnp.float32)
    counted = count_flops(lambda vae, *given: vae.stream_decode(*given, first=False), vae, latent, cache)
    formula = DECODER_FLOP * 64 * height * width * 12 + DECODER_ATTENTION * 3 * (height * width) ** 2
    assert formula == pytest.approx(counted, rel=1e-3)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == DECODER_CACHE * height * width


def test_memory_of_the_vae_is_that_of_its_programs() -> None:
    """As compiled for a CPU, in the float32 that it is loaded in: weights, caches, arrays alive at once."""
    height, width = 24, 32
    setup = dataclasses.replace(FIVE, height=8 * height, width=8 * width)
    assert load_model_folder("tiny").vae.dtype.itemsize == setup.vae_bytes
    vae = jax.eval_shape(lambda: make_vae(VAEConfig(), rngs=nnx.Rngs(0)))
    decoded = jax.eval_shape(lambda vae: vae.init_decode_cache(1, height, width), vae)
    encoded = jax.eval_shape(lambda vae: vae.init_encode_cache(1, 8 * height, 8 * width), vae)
    latent = jax.ShapeDtypeStruct((1, 3, height, width, 16), jnp.float32)
    video = jax.ShapeDtypeStruct((1, 12, 8 * height, 8 * width, 3), jnp.float32)

    def temporary(function, *arguments) -> int:
        compiled = jax.jit(function, donate_argnums=2).lower(vae, *arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    decoder, front = decoder_memory(setup), front_memory(setup)
    assert decoder["VAE"] == front["VAE"] == pytest.approx(size_of(vae), rel=1e-3)
    assert decoder["VAE caches"] == size_of(decoded)
    decoding = temporary(lambda vae, *given: vae.stream_decode(*given, first=False), latent, decoded)
    assert decoder["working"] == pytest.approx(decoding, rel=0.05)
    encoding = temporary(lambda vae, *given: vae.stream_encode(*given, first=False), video, encoded)
    assert front["working"] == pytest.approx(encoding + size_of(encoded), rel=0.1)


def size_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_speech_text_and_photos_are_on_the_first_device_and_the_decoder_on_the_last() -> None:
    first, second, *_, last = make_plan(FIVE).loads
    shared = {key: value for key, value in first.memory.items() if key not in ("encoders", "VAE", "working")}
    assert shared == {key: value for key, value in second.memory.items() if key in shared}
    assert first.memory["encoders"] == 4 * 315.5e6 + 2 * 5.681e9
    assert first.memory["working"] > last.memory["working"] > second.memory["working"]
    assert "encoders" not in second.memory | last.memory

    first, *_, last = make_plan(dataclasses.replace(FIVE, decoder=None)).loads
    assert "VAE caches" not in first.memory
    assert last.memory["VAE caches"] > 0

    [alone] = make_plan(dataclasses.replace(FIVE, ring=(H100,), decoder=None)).loads
    assert alone.memory["VAE"] == first.memory["VAE"]  # there once
    assert alone.memory["working"] == first.memory["working"]  # to encode or to decode
    [split] = make_plan(dataclasses.replace(FIVE, ring=(H100,), decoder=None, tensor=2)).loads
    assert "encoders" in split.memory  # the fuller of the two; the decoder is on the other
    assert "VAE caches" not in split.memory


def test_a_decoder_in_float32_takes_twice_as_long_as_one_in_16_bits() -> None:
    half = dataclasses.replace(FIVE, vae_bytes=2)
    assert make_plan(FIVE).decode_s == pytest.approx(2 * make_plan(half).decode_s)
    # Which is why four H100 are too few, though they would do for the other.
    four = {"decoder": None, "dtype": "fp8"}
    assert make_plan(dataclasses.replace(FIVE, **four)).fps < 25
    assert make_plan(dataclasses.replace(half, **four)).fps > 25


def test_a_pipeline_trades_devices_for_speed_not_for_latency() -> None:
    alone = make_plan(dataclasses.replace(FIVE, ring=(H100,), decoder=None))
    five = make_plan(FIVE)
    assert five.fps > 4 * alone.fps
    assert five.ttff_s == pytest.approx(alone.ttff_s, rel=0.01)
    assert not alone.fits  # 32 GB of weights and four rings
    assert five.fits
    assert alone.packet_bytes == 0


def test_what_makes_it_faster() -> None:
    plain = make_plan(FIVE)
    assert make_plan(dataclasses.replace(FIVE, dtype="fp8")).fps > plain.fps
    shared = make_plan(dataclasses.replace(FIVE, tensor=2))
    assert plain.fps < shared.fps < 2 * plain.fps
    assert shared.loads[1].total_gb < 0.6 * plain.loads[1].total_gb
    assert make_plan(dataclasses.replace(FIVE, height=704, width=384)).fps > plain.fps


def test_the_slowest_stage_and_the_slowest_link_decide() -> None:
    mixed = make_plan(dataclasses.replace(FIVE, ring=(H100, H100, GPUS["h20"], H100)))
    slow = make_plan(dataclasses.replace(FIVE, ring=(GPUS["h20"],) * 4))
    assert mixed.fps == pytest.approx(slow.fps, rel=1e-6)
    assert mixed.ttff_s < slow.ttff_s
    wire = make_plan(dataclasses.replace(FIVE, link=0.125))  # 1 Gbit/s
    assert wire.hop_s == pytest.approx(wire.packet_bytes / 0.125e9)
    assert wire.tick_s == pytest.approx(make_plan(FIVE).tick_s + wire.hop_s, rel=1e-3)


def test_two_sessions_take_twice_the_time_and_rings() -> None:
    one, two = make_plan(FIVE), make_plan(dataclasses.replace(FIVE, sessions=2))
    assert two.fps == pytest.approx(one.fps / 2, rel=1e-3)
    assert two.loads[0].memory["rings"] == 2 * one.loads[0].memory["rings"]
    assert two.loads[0].memory["weights"] == one.loads[0].memory["weights"]


@pytest.mark.parametrize("params", [5e8, 1.3e9, 5e9, 14e9, 30e9, 100e9])
def test_sizes(params: float) -> None:
    config = dit_for(params)
    assert layer_parameters(config)["blocks"] == pytest.approx(params, rel=0.1)
    assert config.head_dim == 128


def test_the_published_sizes() -> None:
    assert dit_for(14e9) == DiTConfig()
    assert (dit_for(1.3e9).layers, dit_for(1.3e9).width) == (30, 1536)


def test_needs_finds_the_least() -> None:
    [found] = needs(FIVE, 25, [H100])
    assert found.setup.devices <= 5
    assert found.fits
    assert found.fps >= 25
    [more] = needs(FIVE, 38, [H100])
    assert more.setup.devices > 5
    assert needs(FIVE, 2000, [H100]) == []


def test_a_measurement_predicts_itself() -> None:
    """Calibrated with a made-up report, the plan gives back the time of that report."""
    shape = StreamShape(config=DiTConfig(), height=88, width=48)
    report = {
        "kind": "step", "device": "NVIDIA H100 80GB HBM3", "dtype": "bf16", "date": "2026-01-01", "ms": 240.0,
        "ceiling_tflops": {"linear": 780.0, "attention": 780.0}, "bandwidth_gbs": H100.bandwidth,
        "text_cached": True, "pixels": [704, 384], "size": "14b", "layers": 40,
    }  # fmt: skip
    calibration = from_measurement(report, shape)
    assert calibration.decoder_passes == PAPER.decoder_passes
    setup = dataclasses.replace(FIVE, height=704, width=384, calibration=calibration)
    assert make_plan(setup).loads[0].work_s == pytest.approx(0.240, rel=1e-6)
    with pytest.raises(UserError, match="bench_step"):
        from_measurement({}, shape)

    report["ceiling_tflops"]["decoder"] = 400.0
    report |= {"decoder": {"ms": 250.0}, "decoder_flops": 30e12}
    calibration = from_measurement(report, shape)
    setup = dataclasses.replace(setup, calibration=calibration)
    assert make_plan(setup).decode_s == pytest.approx(0.250, rel=0.05)  # its arithmetic is worked out anew
    assert calibration.decoder_rate(H100, 4) == 400.0
    assert calibration.decoder_rate(GPUS["h20"], 4) == GPUS["h20"].rate("fp32")


def test_the_decoder_is_measured_as_it_is_loaded() -> None:
    arguments = jax.eval_shape(lambda: decoder_arguments(VAEConfig(), 4, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(arguments)} == {jnp.dtype(jnp.float32)}


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "plan.json"
    command = "--params 14e9 --gpu h100 --gpus 5 --resolution 720x400 --json"
    monkeypatch.setattr("sys.argv", ["plan.py", *command.split(), str(out)])
    tool.main()
    assert "36.0 in each of 1 session(s); 25 wanted: yes" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["devices"] == 5
    assert report["forward_tflop"] == pytest.approx(133.6, rel=1e-3)
    monkeypatch.setattr("sys.argv", ["plan.py", "--paper"])
    tool.main()
    assert capsys.readouterr().out.count("%") == 12


@pytest.mark.parametrize(
    "arguments",
    [
        "--gpu h999",
        "--gpus 7",
        "--resolution 720",
        "--params 1",
        "--tensor 3",
        "--gpus 7 --tensor 2",
        "--steps 0",
        "--decoder 4090",
        "--gpus 7 --stages h100,h100",
        "--link -5",
        "--link 0",
        "--needs 0",
        "--fps 0",
        "--calibration README.md",
        "--json nowhere/x.json",
        "--json x.txt",
    ],
)
def test_mistakes_are_one_line(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments.split()])
    assert run(tool.main) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")


def test_a_calibration_is_of_the_right_tool(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"kind": "session"}')
    arguments = tool.parser().parse_args(["--calibration", str(tmp_path / "other.json")])
    with pytest.raises(UserError, match=r"not the JSON that tools/bench_step\.py writes"):
        tool.setup_from(arguments)


def test_a_calibration_counts_for_the_device_and_the_numbers_that_were_measured() -> None:
    measured = Calibration(
        name="mine",
        passes=1.0,
        decoder_passes=1.0,
        measured="NVIDIA H200",
        dtype="fp8",
        ceilings=(1000.0, 500.0),
    )  # fmt: skip
    h20, h200 = GPUS["h20"], GPUS["h200"]
    assert measured.rates(h20, "fp8") == (h20.rate("fp8"), h20.rate("bf16"))
    assert measured.rates(h200, "fp8") == (1000.0, 500.0)
    assert measured.rates(h200, "bf16") == (h200.rate("bf16"), 500.0)
