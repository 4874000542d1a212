"""One streaming forward with a full ring: milliseconds, TFLOP/s, memory, share of what the device can do.

    python tools/bench_step.py --size 14b --dtype bf16 --resolution 704x384 --attention cudnn --json step.json
    python tools/bench_step.py --size 14b --dtype fp32 --resolution 128x128 --layers 1     # shows it on a CPU
    python tools/plan.py --params 14e9 --gpu h100 --gpus 5 --calibration step.json         # uses the numbers

Weights are random and are made on the device, one after the other; nothing but the repository is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lavatar_jax.checkpoints.store import load_config, model_folder
from lavatar_jax.cli import run
from lavatar_jax.config import DiTConfig, SamplingConfig, VAEConfig
from lavatar_jax.evaluation.capacity import dit_for
from lavatar_jax.evaluation.devices import arithmetic_s
from lavatar_jax.evaluation.flops import StreamShape, count_flops
from lavatar_jax.files import write_text
from lavatar_jax.inference.denoise import init_rings, plan_block
from lavatar_jax.inference.output import check_output
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.dit import CausalDiT, timestep_sinusoid
from lavatar_jax.models.dit_forward import stream_forward
from lavatar_jax.models.vae import make_vae
from lavatar_jax.quant import E4M3, is_quantized, quantize_weight

DTYPES = {"bf16": jnp.bfloat16, "fp8": jnp.bfloat16, "fp32": jnp.float32}
LATE_BLOCK = 1000  # far into a video: the ring is full


def configurations(size: str, layers: int | None) -> tuple[DiTConfig, VAEConfig, SamplingConfig]:
    """Of the published sizes and of the shipped model, cut to the first `layers`."""
    if size == "tiny":
        model = load_config(model_folder("tiny"))
        dit, vae, sampling = model.dit, model.vae, model.sampling
    else:
        dit, vae, sampling = dit_for({"14b": 14e9, "1.3b": 1.3e9}[size]), VAEConfig(), SamplingConfig()
    if layers is not None and layers < dit.layers:
        kept = tuple(layer for layer in dit.inject_layers if layer < layers)
        dit = dataclasses.replace(dit, layers=layers, inject_layers=kept)
    return dit, vae, sampling


def measured_shape(report: dict[str, Any]) -> StreamShape:
    """The forward that a report of this tool is about."""
    config, vae, sampling = configurations(report["size"], report["layers"])
    height, width = (side // vae.spatial_factor for side in report["pixels"])
    return StreamShape(
        config=config,
        height=height,
        width=width,
        ring_blocks=sampling.ring_blocks,
        motion=sampling.motion and sampling.sink,
    )


# ---- a model without a checkpoint ------------------------------------------------------------------------


def random_model(make: Callable[[], Any], dtype: Any, *, quantized: bool = False) -> Any:
    """Random parameters for what `make` would build, drawn on the device in `dtype`, leaf after leaf.

    Large matrices are rounded to 8 bits as they come (`quantized`), so that the whole model is never there
    in 16 bits.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(make))
    filled = []
    for number, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator=".").replace(".value", "")
        value = _random(jax.random.key(number), leaf.shape, dtype)
        filled.append(quantize_weight(value) if quantized and is_quantized(name) else value)
    return jax.tree_util.tree_unflatten(structure, filled)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers that keep activations near unit size."""
    fan_in = int(np.prod(shape[:-1])) // (shape[0] if len(shape) == 3 else 1)

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (jax.random.normal(key, shape) * max(fan_in, 1) ** -0.5).astype(dtype)

    if np.prod(shape) < 2**24:
        return draw(key, shape)
    # One layer at a time: numbers are drawn in float32, which for all of them would take too much room.
    return jax.lax.map(lambda key: draw(key, shape[1:]), jax.random.split(key, shape[0]))


# ---- the measured programs -------------------------------------------------------------------------------


def step_arguments(
    config: DiTConfig,
    sampling: SamplingConfig,
    height: int,
    width: int,
    *,
    dtype: Any,
    quantized: bool = False,
    text_cached: bool = True,
) -> tuple[Any, ...]:
    """What `step_function` takes, for a latent of `height` x `width`; the ring holds random keys."""
    dit = random_model(lambda: CausalDiT(config, rngs=nnx.Rngs(0)), dtype, quantized=quantized)
    keys = iter(jax.random.split(jax.random.key(1), 8))
    empty = jax.eval_shape(lambda: init_rings(config, sampling, 1, height, width, dtype)[0])
    ring = jax.tree.map(lambda leaf: _random(next(keys), leaf.shape, dtype), empty)
    latent = jax.random.normal(next(keys), (1, config.block_frames, height, width, config.latent_channels))
    sinusoid = jnp.asarray(timestep_sinusoid(np.full((1, config.block_frames), 750.0), config.freq_dim))
    states = jax.random.normal(next(keys), (1, config.text_len, config.text_dim)).astype(dtype)
    sound = (1, 1, config.audio_layers, config.audio_dim, 4 * config.block_frames)
    features = jax.random.normal(next(keys), sound)
    plan = plan_block(config, sampling, LATE_BLOCK, height, width, [20] * sampling.steps)
    text = jax.jit(lambda dit: dit.text_keys_values(states))(dit) if text_cached else states
    times = jax.jit(lambda dit: dit.embed_time(sinusoid))(dit) if text_cached else sinusoid
    return ring, dit, latent, times, text, features, plan.slot, plan.rope, plan.sink_ropes[0]


def step_function(*, unroll: bool = False, text_cached: bool = True) -> Callable[..., Any]:
    """(ring, ...) -> (velocity, ring); without cached text, prompt and timestep are embedded every time."""

    def step(
        ring: Any, dit: CausalDiT, latent: Any, times: Any, text: Any, features: Any, *place: Any
    ) -> tuple[Any, Any]:
        if not text_cached:
            text, times = dit.text_keys_values(text), dit.embed_time(times)
        audio = encode_audio(dit.audio_encoder, features)
        return stream_forward(dit, ring, latent, times, text, audio, *place, unroll=unroll)

    return step


def decoder_arguments(config: VAEConfig, height: int, width: int) -> tuple[Any, ...]:
    """What `decode` takes: float32, as the VAE is loaded with a transformer of any dtype."""
    vae = random_model(lambda: make_vae(config, rngs=nnx.Rngs(0)), jnp.float32)
    latent = jax.random.normal(jax.random.key(2), (1, 3, height, width, config.latent_channels))
    cache = jax.jit(lambda vae: vae.init_decode_cache(1, height, width))(vae)
    return cache, vae, latent


def decode(cache: Any, vae: Any, latent: Any) -> tuple[Any, Any]:
    return vae.stream_decode(latent, cache, first=False)


# ---- measuring -------------------------------------------------------------------------------------------


def measure(
    function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int, profile: str | None = None
) -> dict[str, Any]:
    """Compile, warm up, and time calls whose first argument is donated and comes back as second result."""
    start = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    state, rest = arguments[0], arguments[1:]
    times = []
    for number in range(repeats + 2):
        if profile and number == 2:
            jax.profiler.start_trace(profile)
        start = time.perf_counter()
        result, state = compiled(state, *rest)
        jax.block_until_ready((result, state))
        times.append((time.perf_counter() - start) * 1e3)
    if profile:
        jax.profiler.stop_trace()
    finite = bool(jnp.isfinite(result.astype(jnp.float32)).all())
    sizes = compiled.memory_analysis()
    assert sizes is not None
    return {
        "ms": statistics.median(times[2:]),
        "ms_best": min(times[2:]),
        "ms_worst": max(times[2:]),
        "compile_s": compile_s,
        "finite": finite,
        "arguments_gb": sizes.argument_size_in_bytes / 1e9,
        "temporary_gb": sizes.temp_size_in_bytes / 1e9,
    }


def matmul_ceiling(dtype: Any, size: int) -> float:
    """TFLOP/s of a large square product, chained so that each depends on the last; random numbers."""
    keys = jax.random.split(jax.random.key(3))
    a, b = (
        _random(key, (size, size), jnp.bfloat16 if dtype == E4M3 else dtype).astype(dtype) for key in keys
    )
    rounds = 8

    @jax.jit
    def chain(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(rounds):
            a = jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(dtype)
        return a

    return rounds * 2 * size**3 / (median_ms(lambda: chain(a, b)) * 1e9)


def copy_bandwidth(gigabytes: float) -> float:
    """GB/s read and written by a large elementwise program."""
    x = jnp.ones(int(gigabytes * 1e9 / 4), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / (median_ms(lambda: add(x)) * 1e6)


def median_ms(run: Callable[[], Any], repeats: int = 7) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def parse(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("14b", "1.3b", "tiny"), default="tiny")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--resolution", type=parse, help="HEIGHTxWIDTH, not as --size of generate (704x384)")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--unroll", action="store_true", help="layers as a Python loop instead of lax.scan")
    parser.add_argument("--layers", type=int, help="only the first of them")
    parser.add_argument("--text-cached", choices=("yes", "no"), default="yes")
    parser.add_argument(
        "--decoder", action="store_true", help="also time the VAE decoder's block, in float32"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", help="write a jax profile of the repeats to this folder")
    parser.add_argument("--json", type=Path, help="also write the numbers there (plan.py calibrates with it)")
    options = parser.parse_args()
    if options.json:
        check_output(options.json, ".json")

    config, vae_config, sampling = configurations(options.size, options.layers)
    pixels = options.resolution or ((128, 128) if options.size == "tiny" else (704, 384))
    height, width = (side // vae_config.spatial_factor for side in pixels)
    dtype, quantized = DTYPES[options.dtype], options.dtype == "fp8"
    cached = options.text_cached == "yes"
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    if on_cpu and options.attention == "cudnn":
        parser.error("--attention cudnn needs an NVIDIA GPU")

    # Large operands on a GPU, so that it is busy; small ones on a CPU, so that one need not wait.
    size = 1024 if on_cpu else 8192
    ceilings = {"attention": matmul_ceiling(dtype, size)}
    ceilings["linear"] = matmul_ceiling(E4M3, size) if quantized and not on_cpu else ceilings["attention"]
    if options.decoder:
        ceilings["decoder"] = matmul_ceiling(jnp.float32, size)
    bandwidth = copy_bandwidth(0.2 if on_cpu else 4.0)

    made = {"dtype": dtype, "quantized": quantized, "text_cached": cached}
    abstract = jax.eval_shape(lambda: step_arguments(config, sampling, height, width, **made))
    # Counted before a flash kernel hides its products from the count.
    flops = count_flops(step_function(unroll=True, text_cached=cached), *abstract)
    config = dataclasses.replace(config, attention=options.attention)
    arguments = jax.block_until_ready(step_arguments(config, sampling, height, width, **made))
    step = step_function(unroll=options.unroll, text_cached=cached)
    step_report = measure(step, arguments, options.repeats, options.profile)
    del arguments
    tflops = flops / step_report["ms"] / 1e9
    report: dict[str, Any] = {
        "kind": "step",
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": f"{device.platform} {platform.machine()}",
        "jax": jax.__version__,
        "command": " ".join(["python tools/bench_step.py", *sys.argv[1:]]),
        "size": options.size,
        "dtype": options.dtype,
        "attention": options.attention,
        "unroll": options.unroll,
        "text_cached": cached,
        "layers": config.layers,
        "pixels": list(pixels),
        "flops": flops,
        "ceiling_tflops": ceilings,
        "bandwidth_gbs": bandwidth,
        "tflops": tflops,
        **step_report,
    }
    shortest = arithmetic_s(
        measured_shape(report), ceilings["linear"], ceilings["attention"], text_cached=cached
    )
    report["share_of_ceiling"] = 1e3 * shortest / report["ms"]
    if options.decoder:
        decoder = decoder_arguments(vae_config, height, width)
        report["decoder_flops"] = count_flops(decode, *decoder)
        report["decoder"] = measure(decode, decoder, options.repeats)
    print_report(report)
    if options.json:
        write_text(options.json, json.dumps(report, indent=2) + "\n")


def print_report(report: dict[str, Any]) -> None:
    height, width = report["pixels"]
    print(f"{report['device']} ({report['platform']}), jax {report['jax']}, {report['date']}")
    print(f"{report['size']} {report['dtype']}, {report['layers']} layers, {height}x{width}, full ring")
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in report["ceiling_tflops"].items())
    print(f"  ceiling of large products  {rates} TFLOP/s; copies {report['bandwidth_gbs']:.0f} GB/s")
    print(f"  arithmetic                 {report['flops'] / 1e12:.4g} TFLOP")
    spread = f"{report['ms_best']:.2f} to {report['ms_worst']:.2f}"
    print(f"  one forward                {report['ms']:.2f} ms (median; {spread})")
    print(
        f"  rate                       {report['tflops']:.4g} TFLOP/s, "
        f"{report['share_of_ceiling']:.0%} of the ceiling"
    )
    print(f"  frames a second per stage  {12e3 / report['ms']:.1f}")
    memory = f"{report['arguments_gb']:.2f} GB arguments, {report['temporary_gb']:.2f} GB temporary"
    print(f"  memory                     {memory}")
    print(f"  compilation                {report['compile_s']:.1f} s")
    if not report["finite"]:
        print("  WARNING: the result is not finite")
    if decoder := report.get("decoder"):
        rate = report["decoder_flops"] / decoder["ms"] / 1e9
        memory = f"{decoder['arguments_gb']:.2f} GB arguments, {decoder['temporary_gb']:.2f} GB temporary"
        print(f"  decoder, a block           {decoder['ms']:.2f} ms, {rate:.4g} TFLOP/s, {memory}")


if __name__ == "__main__":
    sys.exit(run(main))
