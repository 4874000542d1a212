"""The pipeline's benchmark on a model of a few thousand numbers, and its picture."""

import argparse
import itertools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lavatar_jax.config import SamplingConfig
from lavatar_jax.evaluation.timeline import Bar, draw_timeline, read_profile, union
from lavatar_jax.types import Conditions
from tests.tiny import normal, random_dit, random_vae, tiny_config, tiny_vae_config
from tools import bench_pipeline as bench
from tools.compile_ahead import Compilations

SAMPLING = SamplingConfig(motion=False, adapt_sink_after=None, prime_latents=2, ring_blocks=3)


def tiny_avatar():
    config = types.SimpleNamespace(dit=tiny_config(), sampling=SAMPLING, fps=200)
    return types.SimpleNamespace(
        config=config, dit=random_dit(tiny_config()), vae=random_vae(tiny_vae_config())
    )


def conditions() -> Conditions:
    config = tiny_config()
    return Conditions(
        text=normal(0, 1, config.text_len, config.text_dim),
        reference=normal(1, 1, 1, 4, 4, 3),
        motion=None,
        still=normal(2, 1, 2, 4, 4, 3),
    )


def test_modes_overlap_and_timeline(tmp_path: Path) -> None:
    picture = tmp_path / "timeline.png"
    options = argparse.Namespace(blocks=3, timeline=picture, modes="5,1")
    avatar = tiny_avatar()
    modes = {name: bench.run_mode(avatar, conditions(), int(name), options) for name in ("5", "1")}
    modes["rollout"] = bench.sequential(avatar, conditions(), 2)
    for report in modes.values():
        bench.add_overlap(report, modes["1"])
    assert (modes["5"]["stages"], modes["1"]["stages"]) == (4, 1)
    # Latent, features, offset, end, and tables of 12 + 4 steps x 4 tokens of 4 angles, cosine and sine.
    words = 3 * 4 * 4 * 3 + 2 * 5 * 12 + 1 + 1 + 2 * 4 * (12 + 4 * 4)
    assert modes["5"]["hop_bytes"] == 4 * words
    assert modes["1"]["hop_bytes"] == 0
    assert modes["5"]["ideal_tick_ms"] < modes["1"]["ideal_tick_ms"]
    assert modes["1"]["frames_per_s"] == pytest.approx(12e3 / modes["1"]["tick_ms"], rel=1e-6)
    with Image.open(picture) as image:
        assert image.height > 5 * 40
    text = bench.table(modes)
    assert "| frames/s, flat out |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_a_profile_tells_devices_and_runs_apart(tmp_path: Path) -> None:
    def work(x):
        return jnp.sin(x @ x)

    first, second = jax.devices()[:2]
    program = jax.jit(work)
    inputs = [jax.device_put(np.ones((64, 64), np.float32), device) for device in (first, second)]
    jax.block_until_ready([program(x) for x in inputs])
    jax.profiler.start_trace(str(tmp_path))
    for x in (inputs[0], inputs[1], inputs[1]):
        jax.block_until_ready(program(x))
    jax.profiler.stop_trace()
    spans = [span for span in read_profile(tmp_path) if span.program == "jit_work"]
    assert [span.device for span in spans] == [first.id, second.id, second.id]
    assert all(0 <= a.start < a.end <= b.start for a, b in itertools.pairwise(spans))
    assert all(0 < span.busy <= span.end - span.start for span in spans)


def test_union_counts_overlaps_once() -> None:
    assert union([(3, 4), (0, 2), (1, 2.5), (1, 1.5)]) == 3.5


def test_bars_lie_where_their_times_are() -> None:
    rows = [("first", [Bar(0, 1, "0", 0)]), ("second", [Bar(1, 2), Bar(3, 4, "0", 0)])]
    image = np.asarray(draw_timeline("title", rows, width=590, step=1.0)).astype(int)

    def colour(seconds: float, row: int) -> tuple[int, ...]:
        return tuple(image[44 + 44 * row + 5, int(190 + seconds / 4 * (590 - 210))])

    block = colour(0.1, 0)
    assert colour(0.9, 0) == block == colour(3.1, 1)
    assert colour(1.5, 1) == (170, 170, 170)
    assert colour(2.5, 1) == (255, 255, 255) == colour(1.5, 0)


def test_compilations_are_counted() -> None:
    compilations = Compilations()
    jax.jit(lambda x: x * 3 + 1)(np.ones(7, np.float32))
    assert len(compilations.compiled) + compilations.found == 1
