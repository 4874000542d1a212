"""How fast a model talks on this machine: every part, the whole, and its DiT step against PyTorch.

    python tools/bench_tiny.py [--model tiny] [--seconds 20] [--minutes 10] [--json FILE]

Needs nothing but the model; the comparison with PyTorch is skipped, and says so, where torch is not installed
(the `convert` extra has it). Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import configure_jax, run
from lavatar_jax.files import write_text

configure_jax()  # before jax is imported

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.inference.decode import StreamDecoder
from lavatar_jax.inference.denoise import (
    denoise_block,
    fill_sink,
    init_rings,
    plan_block,
    start_session,
    uses_motion,
)
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.inference.images import load_image
from lavatar_jax.inference.listen import feature_blocks, make_stream
from lavatar_jax.inference.output import check_output
from lavatar_jax.inference.sound import SAMPLE_RATE, load_sound
from lavatar_jax.inference.talk import photo_conditions, talk
from lavatar_jax.inference.video import VideoWriter
from lavatar_jax.models.attention import ring_slot
from lavatar_jax.models.audio_encoder import encode_audio
from lavatar_jax.models.avatar import Avatar, square_size
from lavatar_jax.models.dit_forward import stream_forward
from lavatar_jax.models.speech_level import normalise_level
from lavatar_jax.types import BlockInput

REPEATS = 7


def example(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """The bundled face, and its voice over and over: noise would encode and speak like nobody."""
    voice = normalise_level(load_sound(SAMPLES / "voice.flac").samples)
    return load_image(SAMPLES / "face.png"), np.resize(voice, round(seconds * SAMPLE_RATE))


def best_ms(run: Callable[[], Any], count: int = 10) -> float:
    """Milliseconds per call: the best of several rounds, which the machine's other work disturbs least."""
    run()
    rounds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            run()
        rounds.append((time.perf_counter() - start) / count * 1e3)
    return min(rounds)


def parts(avatar: Avatar) -> dict[str, float]:
    """Milliseconds per block of 12 frames, part by part: the best of `REPEATS` rounds each."""
    config, sampling, dit = avatar.config, avatar.config.sampling, avatar.dit
    size = square_size(avatar) // config.vae.spatial_factor
    photo, sound = example(1.0)
    frames = config.dit.block_frames * config.vae.temporal_factor
    conditions = photo_conditions(avatar, photo)
    session = start_session(dit, conditions.text, None, sampling=sampling)
    rings = init_rings(config.dit, sampling, 1, size, size, dit.dtype)
    motion = conditions.motion if uses_motion(config.dit, sampling) else None
    rings = fill_sink(dit, rings, conditions.reference, motion, session.text, half_table=False)
    distances = [20] * (sampling.steps + 1)
    feature = next(feature_blocks(make_stream(avatar), [sound], frames))
    inputs = BlockInput(jnp.asarray(feature[None, None]))
    noise = jnp.zeros((1, config.dit.block_frames, size, size, config.dit.latent_channels))
    plan = plan_block(config.dit, sampling, 1000, size, size, distances)
    state = {"rings": rings, "latent": noise}

    def denoise() -> None:
        state["latent"], _, state["rings"] = denoise_block(dit, state["rings"], noise, inputs, plan, session)
        jax.block_until_ready(state["latent"])

    decoder = StreamDecoder(avatar.vae, conditions.still, 0)
    result = {
        "features": best_ms(lambda: list(feature_blocks(make_stream(avatar), [sound], frames)))
        / (16_000 / 640 / frames),
        "positions": best_ms(lambda: plan_block(config.dit, sampling, 1000, size, size, distances)),
        f"denoise ({sampling.steps} steps)": best_ms(denoise, 5),
        "decode": best_ms(lambda: jax.block_until_ready(decoder(state["latent"])), 5),
    }
    video = next(talk(avatar, conditions, example(2.0)[1]))
    video = video[np.arange(frames) % len(video)]
    with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder) / "bench.mp4") as writer:
        result["write MP4"] = best_ms(lambda: writer.write(video), 5)
    return result


def end_to_end(avatar: Avatar, seconds: float) -> dict[str, float]:
    """Frames a second from sound to a finished MP4, and the time to the first frames."""
    config = avatar.config
    image, sound = example(seconds)
    start = time.perf_counter()
    conditions = photo_conditions(avatar, image)
    with tempfile.TemporaryDirectory() as folder:
        with VideoWriter(Path(folder) / "bench.mp4", fps=config.fps) as writer:
            count, first = 0, 0.0
            for frames in talk(avatar, conditions, sound):
                writer.write(frames)
                if not count:
                    first, after_first = len(frames), time.perf_counter()
                count += len(frames)
        end = time.perf_counter()
    return {
        "first_frame_s": after_first - start,
        "since_start_s": after_first - START,
        "frames_per_s": (count - first) / (end - after_first),
    }


def memory_over(avatar: Avatar, minutes: int) -> list[float]:
    """Peak resident memory, MB, after each minute of one long MP4."""
    config = avatar.config
    photo, sound = example(10.0)
    conditions = photo_conditions(avatar, photo)
    peaks: list[float] = []
    count, total = 0, minutes * 60 * config.fps
    blocks = talk(avatar, conditions, (sound for _ in range(minutes * 6)))
    with tempfile.TemporaryDirectory() as folder, VideoWriter(Path(folder) / "bench.mp4") as writer:
        for frames in track(blocks, total=total // 12, description=f"{minutes} minutes"):
            writer.write(frames)
            count += len(frames)
            if count // (60 * config.fps) > len(peaks):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


def step_against_torch(avatar: Avatar) -> dict[str, float] | None:
    """One streaming step (full ring) in JAX and in PyTorch, measured in turn; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    from tools.torch_step import StreamingStep

    config, sampling, dit = avatar.config, avatar.config.sampling, avatar.dit
    size = square_size(avatar) // config.vae.spatial_factor
    conditions = photo_conditions(avatar, np.full((size, size, 3), 128, np.uint8))
    session = start_session(dit, conditions.text, None, sampling=sampling)
    ring = init_rings(config.dit, sampling, 1, size, size, dit.dtype)[0]
    plan = plan_block(config.dit, sampling, 1000, size, size, [20] * (sampling.steps + 1))
    latent = jnp.zeros((1, config.dit.block_frames, size, size, config.dit.latent_channels))
    features = np.zeros((1, 1, config.dit.audio_layers, config.dit.audio_dim, 12), np.float32)
    audio = encode_audio(dit.audio_encoder, jnp.asarray(features))
    tokens = latent.shape[1] * (size // config.dit.patch) ** 2
    slot = ring_slot(1000, tokens, sampling.ring_blocks * tokens)
    step = jax.jit(stream_forward, donate_argnums=1)
    state = {"ring": ring}

    def run_jax() -> None:
        velocity, state["ring"] = step(
            dit,
            state["ring"],
            latent,
            session.times[0],
            session.text,
            audio,
            slot,
            plan.rope,
            plan.sink_ropes[0],
        )
        jax.block_until_ready(velocity)

    model = StreamingStep(config.dit, size, size, sampling.ring_blocks)
    patches = torch.randn(1, tokens, config.dit.patch**2 * config.dit.latent_channels)
    pairs = [(best_ms(run_jax, 10), best_ms(lambda: model(patches, 1), 10)) for _ in range(3)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "jax_ms": ours,
        "torch_ms": theirs,
        "ratio": ours / theirs,
        "torch_threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="shipped model or model folder")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the end-to-end run")
    parser.add_argument("--minutes", type=int, default=0, help="also watch the memory of a video this long")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    if arguments.json:
        check_output(arguments.json, ".json")

    start = time.perf_counter()
    avatar = load_model_folder(arguments.model)
    load = time.perf_counter() - start
    config = avatar.config
    cold = end_to_end(avatar, 2.0)
    warm = end_to_end(avatar, arguments.seconds)
    # Before PyTorch is loaded, whose memory would count: the peak is that of the whole process.
    peaks = memory_over(avatar, arguments.minutes) if arguments.minutes else []
    times = parts(avatar)
    step = step_against_torch(avatar)
    budget = config.dit.block_frames * config.vae.temporal_factor / config.fps * 1e3

    print(f"{config.name}: {config.image_size} px, {config.sampling.steps} steps, batch 1, float32")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {platform.machine()}")
    for name, value in times.items():
        print(f"  {name:22s} {value:8.2f} ms a block ({value / budget:6.1%} of real time; best of {REPEATS})")
    speed = warm["frames_per_s"]
    print(f"  {'load the model':22s} {load:8.2f} s")
    print(f"  {'first frame':22s} {cold['since_start_s']:8.2f} s from the start of the process")
    print(f"  {'first frame, next video':22s} {warm['first_frame_s']:7.2f} s")
    print(f"  {'end to end':22s} {speed:8.1f} frames/s ({speed / config.fps:.1f}x real time)")
    if step is None:
        print("  DiT step against PyTorch: skipped, torch is not installed")
    else:
        jax_ms, torch_ms, ratio = step["jax_ms"], step["torch_ms"], step["ratio"]
        print(f"  {'one DiT step':22s} {jax_ms:8.2f} ms; PyTorch {torch_ms:.2f} ms; ratio {ratio:.2f}")
    if peaks:
        after = f"{peaks[-1]:.0f} MB after {len(peaks)} ({peaks[-1] / peaks[0] - 1:+.1%})"
        print(f"  {'peak memory':22s} {peaks[0]:8.0f} MB after 1 minute, {after}")
    if arguments.json:
        report = {
            "parts_ms": times,
            "cold": cold,
            "warm": warm,
            "load_s": load,
            "step": step,
            "jax": jax.__version__,
        }
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
