"""The pipeline in each of its layouts: speed, latency, host time, overlap, memory, and a picture of it.

    python tools/bench_pipeline.py --devices 5 --json pipeline.json --timeline pipeline.png
    python tools/bench_pipeline.py --devices 5 --modes 5 --blocks 40

On a CPU the devices are virtual: they share its cores, so more of them are no faster, but every byte goes the
way it would. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", default="tiny", help="shipped model or model folder")
    add("--devices", type=int, help="make so many virtual devices (CPU only)")
    add("--modes", default="5,4,2,1,rollout", help="numbers of devices, and `rollout` for the sequential one")
    add("--blocks", type=int, default=25, help="blocks (480 ms each) of each measurement")
    add("--session", action="store_true", help="also measure silence-to-speech, live, through a session")
    add("--timeline", type=Path, help="draw who computes when in the first mode, as a PNG")
    add("--json", type=Path, help="also write the numbers there")
    return result


if __name__ == "__main__":
    OPTIONS = parser().parse_args()
    if OPTIONS.devices:  # jax reads it when it is imported
        flag = f"--xla_force_host_platform_device_count={OPTIONS.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    from lavatar_jax.cli import configure_jax

    configure_jax()

import jax
import numpy as np

from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.cli import run
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.timeline import Bar, draw_timeline, read_profile
from lavatar_jax.files import replacing, write_text
from lavatar_jax.inference.output import check_output
from lavatar_jax.inference.pipeline import Feed, Finished, Pipeline
from lavatar_jax.inference.rollout import Draws, rollout
from lavatar_jax.inference.talk import photo_conditions
from lavatar_jax.models.avatar import Avatar
from lavatar_jax.parallel import layout_for
from lavatar_jax.types import BlockInput, Conditions

TICK = "tick"  # name of the host's part in a profile


class Video:
    """One video on a pipeline: makes feeds, runs ticks, and notes how long the host takes for what."""

    def __init__(self, avatar: Avatar, conditions: Conditions, pipeline: Pipeline) -> None:
        self.pipeline, self.conditions = pipeline, conditions
        config = avatar.config
        self.period = config.dit.block_frames * avatar.vae.config.temporal_factor / config.fps
        shape = (1, config.dit.block_frames, pipeline.height, pipeline.width, config.dit.latent_channels)
        self._draws = Draws(config.sampling, shape, 0)
        self._inputs = block_inputs(avatar)
        self.host_s: list[float] = []
        self.host_cpu_s: list[float] = []
        self.decode_call_s: list[float] = []
        self.open()

    def open(self) -> None:
        self.pipeline.open(0, self.conditions)
        self.index = 0

    def feed(self) -> dict[int, Feed]:
        index, self.index = self.index, self.index + 1
        draws = self._draws
        return {0: Feed(index, draws.noise(index), next(self._inputs), draws.distances(index))}

    def tick(self, feed: dict[int, Feed] | None = None) -> list[Finished]:
        start, worked = time.perf_counter(), time.thread_time()
        with jax.profiler.TraceAnnotation(TICK):
            finished = self.pipeline.tick(feed)
        self.host_s.append(time.perf_counter() - start)
        self.host_cpu_s.append(time.thread_time() - worked)
        return finished

    def decode(self, finished: list[Finished]) -> list[jax.Array]:
        start = time.perf_counter()
        frames = [self.pipeline.decode(block) for block in finished]
        if frames:
            self.decode_call_s.append(time.perf_counter() - start)
        return frames

    def drain(self) -> None:
        while self.pipeline.busy:
            jax.block_until_ready(self.decode(self.tick()))
        jax.block_until_ready(self.pipeline.rings)


def block_inputs(avatar: Avatar) -> Iterator[BlockInput]:
    config = avatar.config.dit
    generator = np.random.default_rng(0)
    shape = (1, 1, config.audio_layers, config.audio_dim, 4 * config.block_frames)
    while True:
        yield BlockInput(generator.standard_normal(shape, np.float32))  # type: ignore[arg-type]


def flat_out(video: Video, blocks: int) -> dict[str, float]:
    """As fast as it goes; the host has the frames of a block while the devices work on the next."""
    for _ in range(2 * video.pipeline.layout.stages + 2):
        jax.block_until_ready(video.decode(video.tick(video.feed())))
    video.host_s.clear()
    before: list[jax.Array] = []
    frames, start = 0, time.perf_counter()
    for _ in range(blocks):
        decoded = video.decode(video.tick(video.feed()))
        frames += sum(np.asarray(x).shape[1] for x in before)
        before = decoded
    frames += sum(np.asarray(x).shape[1] for x in before)
    seconds = time.perf_counter() - start
    video.drain()
    return {
        "frames_per_s": frames / seconds,
        "tick_ms": seconds / blocks * 1e3,
        "host_ms_flat_out": statistics.median(video.host_s) * 1e3,
    }


def paced(video: Video, blocks: int) -> dict[str, float]:
    """At 25 frames a second, as a live session goes: host time, and when frames come."""
    video.drain()
    for _ in range(video.pipeline.layout.stages):  # fill the pipeline
        jax.block_until_ready(video.decode(video.tick(video.feed())))
    for times in (video.host_s, video.host_cpu_s, video.decode_call_s):
        times.clear()
    ready, late = [], 0
    begin = time.perf_counter()
    for number in range(blocks):
        due = begin + number * video.period
        time.sleep(max(0.0, due - time.perf_counter()))
        decoded = video.decode(video.tick(video.feed()))
        [np.asarray(x) for x in decoded]
        ready.append(time.perf_counter() - due)
        late += ready[-1] > video.period
    return {
        "host_ms": statistics.median(video.host_s) * 1e3,
        "host_ms_worst": max(video.host_s) * 1e3,
        "host_cpu_ms": statistics.median(video.host_cpu_s) * 1e3,
        "decode_call_ms": statistics.median(video.decode_call_s) * 1e3,
        "busy_ms_paced": statistics.median(ready) * 1e3,
        "late_blocks": late,
        "paced_blocks": blocks,
    }


def first_frame(video: Video, repeats: int = 3) -> dict[str, float]:
    """From an empty pipeline to the first frames on the host, programs compiled; medians."""
    opening, waiting = [], []
    for _ in range(repeats):
        video.drain()
        start = time.perf_counter()
        video.open()
        jax.block_until_ready((video.pipeline.rings, video.pipeline.text))
        opened = time.perf_counter()
        finished = video.tick(video.feed())
        while not finished:
            finished = video.tick(video.feed())
        np.asarray(video.decode(finished)[0])
        opening.append(opened - start)
        waiting.append(time.perf_counter() - opened)
    video.drain()
    return {
        "open_s": statistics.median(opening),
        "ttff_s": statistics.median(waiting),
        "open_and_ttff_s": statistics.median(map(sum, zip(opening, waiting, strict=True))),
    }


def parts(video: Video, repeats: int = 7) -> dict[str, float]:
    """Milliseconds of denoising and decoding one block on one device that has the machine for itself."""
    denoising, decoding = [], []
    for _ in range(repeats):
        feed = video.feed()
        start = time.perf_counter()
        finished = video.tick(feed)
        jax.block_until_ready((finished[0].latent, video.pipeline.rings))
        middle = time.perf_counter()
        jax.block_until_ready(video.decode(finished))
        denoising.append(middle - start)
        decoding.append(time.perf_counter() - middle)
    return {
        "denoise_ms": statistics.median(denoising) * 1e3,
        "stage_ms": statistics.median(denoising) * 1e3 / video.pipeline.sampling.steps,
        "decode_ms": statistics.median(decoding) * 1e3,
    }


def memory_mb() -> dict[str, float]:
    """Megabytes on each device: what the runtime has in use, or else all arrays alive, shared ones once."""
    held: dict[Any, dict[int, int]] = {device: {} for device in jax.devices()}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            held[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    used = {device: (device.memory_stats() or {}).get("bytes_in_use") for device in held}
    return {str(d): round((used[d] or sum(sizes.values())) / 1e6, 2) for d, sizes in held.items()}


def hop_bytes(pipeline: Pipeline) -> int:
    """What one stage sends to the next in a tick."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline._idle)) // pipeline.layout.stages


def silence_to_speech(avatar: Avatar, pipeline_devices: int, photo: np.ndarray) -> dict[str, float]:
    """Live, through a session: 2 s of silence, then a voice; medians over some rounds."""
    from lavatar_jax.inference.session_host import SessionHost
    from lavatar_jax.inference.sound import SAMPLE_RATE

    layout = layout_for(pipeline_devices, avatar.config.sampling.steps)
    host = SessionHost(avatar, layout=layout)
    generator = np.random.default_rng(0)
    piece = SAMPLE_RATE // 50
    with contextlib.ExitStack() as stack:
        stack.callback(host.close)
        host.start()
        session = host.open(photo, live=True, on_block=lambda block: None)
        start, rounds = time.perf_counter(), 3
        for number in range(rounds * 150 + 100):
            loud = number % 150 >= 100
            session.push_audio((0.3 * loud * generator.standard_normal(piece)).astype(np.float32))
            time.sleep(max(0.0, start + (number + 1) * 0.02 - time.perf_counter()))
        stats = session.stats
        session.close()
    waits = list(stats.silence_to_speech)
    return {
        "session_ttff_s": stats.ttff or float("nan"),
        "silence_to_speech_s": statistics.median(waits) if waits else float("nan"),
        "session_held_blocks": stats.held,
    }


def sequential(avatar: Avatar, conditions: Conditions, blocks: int) -> dict[str, float]:
    """The rollout, one device, no pipeline."""
    made = rollout(avatar.dit, avatar.vae, conditions, block_inputs(avatar), avatar.config.sampling)
    for _ in range(3):
        np.asarray(next(made).frames)
    frames, start = 0, time.perf_counter()
    for _ in range(blocks):
        frames += np.asarray(next(made).frames).shape[1]
    seconds = time.perf_counter() - start
    waits = []
    for _ in range(3):
        start = time.perf_counter()
        fresh = rollout(avatar.dit, avatar.vae, conditions, block_inputs(avatar), avatar.config.sampling)
        np.asarray(next(fresh).frames)
        waits.append(time.perf_counter() - start)
    return {
        "frames_per_s": frames / seconds,
        "tick_ms": seconds / blocks * 1e3,
        "open_and_ttff_s": statistics.median(waits),
    }


def timeline(video: Video, blocks: int, title: str) -> Any:
    """Profile the start of a video and a few blocks; a row for the host, each stage and the decoder."""
    video.drain()
    video.open()
    decoder = video.pipeline.decoders[0]
    assert decoder is not None
    jax.block_until_ready((video.pipeline.rings, decoder.state()[0]))
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        before: list[jax.Array] = []
        for _ in range(blocks):
            decoded = video.decode(video.tick(video.feed()))
            jax.block_until_ready(before)
            before = decoded
        jax.block_until_ready((video.pipeline.rings, before))
        jax.profiler.stop_trace()
        spans = read_profile(folder)
    stages = video.pipeline.layout.stages
    ring = [device.id for device in video.pipeline.mesh.devices[:, 0]]
    rows: list[tuple[str, list[Bar]]] = []
    for stage, device in enumerate(ring):
        found = [span for span in spans if span.device == device and "tick" in span.program]
        bars = [
            Bar(
                span.start, span.end, f"{tick - stage}" if tick >= stage else "bubble", block_of(tick - stage)
            )
            for tick, span in enumerate(found)
        ]
        steps = video.pipeline.sampling.steps // stages
        name = f"step {stage + 1}" if steps == 1 else f"steps {stage * steps + 1}-{(stage + 1) * steps}"
        rows.append((f"device {device}: {name}", bars))
    last = video.pipeline.decoder_device.id
    found = [span for span in spans if span.device == last and "_stream" in span.program]
    bars = [Bar(span.start, span.end, f"{block}", block) for block, span in enumerate(found)]
    rows.append((f"device {last}: decoder", bars))
    return draw_timeline(title, rows)


def block_of(number: int) -> int | None:
    return number if number >= 0 else None


def run_mode(
    avatar: Avatar, conditions: Conditions, devices: int, options: argparse.Namespace
) -> dict[str, Any]:
    layout = layout_for(devices, avatar.config.sampling.steps)
    height, width = conditions.reference.shape[2:4]
    pipeline = Pipeline(
        avatar.dit, avatar.vae, avatar.config.sampling, height=height, width=width, layout=layout
    )
    video = Video(avatar, conditions, pipeline)
    report: dict[str, Any] = {"stages": layout.stages, "own_decoder": layout.own_decoder}
    report |= flat_out(video, options.blocks) | paced(video, options.blocks) | first_frame(video)
    report["hop_bytes"] = hop_bytes(pipeline) if layout.stages > 1 else 0
    report["memory_mb"] = memory_mb()
    if devices == 1:
        report |= parts(video)
    if options.timeline and devices == int(options.modes.split(",")[0]):
        own = "a decoder of its own" if layout.own_decoder else "the decoder on the last stage"
        image = timeline(video, layout.stages + 3, f"{layout.stages} stages and {own}: numbers are blocks")
        with replacing(options.timeline) as part:
            image.save(part, "PNG")
    return report


def main(options: argparse.Namespace) -> None:
    if options.json:
        check_output(options.json, ".json")
    names = options.modes.split(",")
    if wrong := [name for name in names if name != "rollout" and not name.isdigit()]:
        raise UserError(f"--modes {options.modes}: {wrong[0]} is no number of devices, and not `rollout`")
    avatar = load_model_folder(options.model)
    if (reason := avatar.config.sampling.why_no_pipeline) is not None:
        raise UserError(f"the model {options.model} cannot be measured: {reason}")
    photo = np.full((256, 256, 3), 128, np.uint8)
    conditions = photo_conditions(avatar, photo)
    modes: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "rollout":
            modes[name] = sequential(avatar, conditions, options.blocks)
            continue
        modes[name] = run_mode(avatar, conditions, int(name), options)
        if options.session:
            modes[name] |= silence_to_speech(avatar, int(name), photo)
    if alone := modes.get("1"):
        for report in modes.values():
            add_overlap(report, alone)
    report = {
        "kind": "pipeline",
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.machine(),
        "jax": jax.__version__,
        "model": options.model,
        "command": " ".join(["python tools/bench_pipeline.py", *sys.argv[1:]]),
        "modes": modes,
    }
    print(
        f"{report['device']}, {report['platform']}, {report['cores']} cores, jax {jax.__version__}, "
        f"{options.model}"
    )
    print(table(modes))
    if options.json:
        write_text(options.json, json.dumps(report, indent=2) + "\n")


def add_overlap(report: dict[str, Any], alone: dict[str, Any]) -> None:
    """Efficiencies: of devices of their own (slowest part / tick), of cores that all share (sum / tick)."""
    if "stages" not in report:
        return
    stage = alone["denoise_ms"] / report["stages"]
    slowest = max(stage, alone["decode_ms"]) if report["own_decoder"] else stage + alone["decode_ms"]
    report["ideal_tick_ms"] = slowest
    report["overlap_efficiency"] = slowest / report["tick_ms"]
    report["shared_cores_efficiency"] = (alone["denoise_ms"] + alone["decode_ms"]) / report["tick_ms"]


ROWS = (
    ("frames/s, flat out", "frames_per_s", "{:.1f}"),
    ("tick, ms", "tick_ms", "{:.1f}"),
    ("host time of a tick at 25 frames/s, ms", "host_ms", "{:.2f}"),
    ("of which the host's thread computes, ms", "host_cpu_ms", "{:.2f}"),
    ("host time of a tick flat out, ms", "host_ms_flat_out", "{:.2f}"),
    ("host time of starting a decode, ms", "decode_call_ms", "{:.2f}"),
    ("work in each 480 ms at 25 frames/s, ms", "busy_ms_paced", "{:.1f}"),
    ("late blocks at 25 frames/s", "late_blocks", "{}"),
    ("opening a video, s", "open_s", "{:.3f}"),
    ("time to first frame, s", "ttff_s", "{:.3f}"),
    ("both, s", "open_and_ttff_s", "{:.3f}"),
    ("silence to speech, s", "silence_to_speech_s", "{:.2f}"),
    ("slowest part alone, ms", "ideal_tick_ms", "{:.1f}"),
    ("share of its tick", "overlap_efficiency", "{:.0%}"),
    ("all parts alone / tick", "shared_cores_efficiency", "{:.0%}"),
    ("a hop, bytes", "hop_bytes", "{:,}"),
    ("denoising alone, ms", "denoise_ms", "{:.1f}"),
    ("decoding alone, ms", "decode_ms", "{:.1f}"),
)


def table(modes: dict[str, dict[str, Any]]) -> str:
    """Markdown, a column a mode."""
    names = [
        f"{report['stages']} stage{'s' * (report['stages'] > 1)}{' + decoder' * report['own_decoder']}"
        if "stages" in report
        else "rollout"
        for report in modes.values()
    ]
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(modes)) + "|"]
    for label, key, form in ROWS:
        if any(key in report for report in modes.values()):
            cells = [form.format(report[key]) if key in report else "" for report in modes.values()]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    memory = [
        ", ".join(f"{size:.0f}" for size in report["memory_mb"].values() if size > 1)
        if "memory_mb" in report
        else ""
        for report in modes.values()
    ]
    lines.append(f"| memory of each device, MB | {' | '.join(memory)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(lambda: main(OPTIONS)))
