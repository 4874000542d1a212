"""How far streamed speech features are from those of the whole recording, for several look-aheads.

    python tools/streaming_features.py [--model DIR] [--audio FILE...] [--seconds 24] [--json FILE]

Without --model: a network of --layers, --width, --conv-width with random weights. Without --audio: held-out
recordings of synthetic voices (needs espeak-ng and flite). Prints a table in Markdown.

The distance is ||streamed - offline|| / ||offline|| of all frames, averaged over the network's layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import configure_jax, run

configure_jax()  # before jax is imported

import jax
import numpy as np
from flax import nnx

from lavatar_jax.checkpoints.orbax_store import restore_component
from lavatar_jax.checkpoints.store import load_config, model_folder
from lavatar_jax.data.speech import recording
from lavatar_jax.errors import UserError
from lavatar_jax.files import write_text
from lavatar_jax.inference.sound import load_sound
from lavatar_jax.inference.speech_features import hidden_states, pick, resample, video_indices
from lavatar_jax.inference.speech_stream import FRAME, SAMPLE_RATE, Wav2Vec2Stream, Wav2Vec2StreamConfig
from lavatar_jax.models.logmel import LogMelConfig, LogMelStream, log_mel
from lavatar_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config

LOOKAHEADS_MS = (0, 80, 160, 320)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Distances of one way of streaming; `ms_per_block` is the median time on this machine."""

    features: str
    lookahead_ms: int | None
    to_reference: float  # the exact offline features
    to_fixed_ratio: float  # the offline states at the stream's own times: what the window and its norm do
    block_start: float  # the latter in the first quarter of each block, which sees most of what follows
    block_end: float  # and in the last quarter
    ms_per_block: float | None = None


def fixed_ratio(states: np.ndarray, frames: int) -> np.ndarray:
    """Offline hidden states [L, T50, D] at the times of a stream's first frames: [L, frames, D]."""
    thirds = np.minimum(5 * np.round(1.2 * np.arange(frames)).astype(int), 3 * (states.shape[1] - 1))
    low, weight = thirds // 3, (thirds % 3 / 3.0)[:, None]
    high = np.minimum(low + 1, states.shape[1] - 1)
    return (states[:, low] * (1 - weight) + states[:, high] * weight).astype(np.float32)


def distance(got: Sequence[np.ndarray], want: Sequence[np.ndarray], quarter: int | None = None) -> float:
    """Of recordings [L, T, D] each; `quarter`: only this quarter of each block of 12 frames."""

    def gather(recordings: Sequence[np.ndarray]) -> np.ndarray:
        chosen = [
            x if quarter is None else x[:, np.arange(x.shape[1]) // 3 % 4 == quarter] for x in recordings
        ]
        return np.concatenate(chosen, axis=1).astype(np.float64)

    g, w = gather(got), gather(want)
    return float(np.mean(np.linalg.norm(g - w, axis=(1, 2)) / np.linalg.norm(w, axis=(1, 2))))


def stream_all(model: Wav2Vec2, sound: np.ndarray, config: Wav2Vec2StreamConfig) -> tuple[np.ndarray, float]:
    """Features [L, T, D] of a recording in blocks as from a microphone, and the median seconds of a block."""
    stream, parts, seconds = Wav2Vec2Stream(model, config), [], []
    step = config.block_frames * FRAME
    for start in range(0, len(sound), step):
        before = time.perf_counter()
        parts.append(stream.push(sound[start : start + step]))
        if parts[-1].shape[-1]:
            seconds.append(time.perf_counter() - before)
    features = np.concatenate([*parts, stream.flush()], axis=-1)
    return features.transpose(0, 2, 1), float(np.median(seconds)) if seconds else 0.0


def measure(model: Wav2Vec2, sounds: Sequence[np.ndarray], context_frames: int) -> list[Row]:
    references, ratios = [], []
    for sound in sounds:
        states = hidden_states(model, sound)
        features30 = resample(states)
        indices = video_indices(features30.shape[1], 48)
        frames = min(-(-len(sound) // FRAME), int((indices < features30.shape[1]).sum()))
        references.append(pick(features30, indices[:frames]))
        ratios.append(fixed_ratio(states, frames))
    nothing = distance(ratios, references)
    rows = [
        Row(
            features="offline, fixed ratio",
            lookahead_ms=None,
            to_reference=nothing,
            to_fixed_ratio=0.0,
            block_start=0.0,
            block_end=0.0,
        )
    ]
    for lookahead_ms in LOOKAHEADS_MS:
        config = Wav2Vec2StreamConfig(context_frames=context_frames, lookahead_ms=lookahead_ms)
        streamed, seconds = zip(*(stream_all(model, sound, config) for sound in sounds), strict=True)
        got = [x[:, : want.shape[1]] for x, want in zip(streamed, references, strict=True)]
        rows.append(
            Row(
                features="wav2vec2",
                lookahead_ms=lookahead_ms,
                to_reference=distance(got, references),
                to_fixed_ratio=distance(got, ratios),
                block_start=distance(got, ratios, 0),
                block_end=distance(got, ratios, 3),
                ms_per_block=1000 * float(np.median(seconds)),
            )
        )
    return [*rows, measure_log_mel(sounds)]


def measure_log_mel(sounds: Sequence[np.ndarray]) -> Row:
    config = LogMelConfig()
    got, want = [], []
    for sound in sounds:
        stream = LogMelStream(config)
        parts = [stream.push(piece) for piece in np.split(sound, range(999, len(sound), 999))]
        got.append(np.concatenate([*parts, stream.flush()], axis=-1).transpose(0, 2, 1))
        want.append(log_mel(sound, config).transpose(0, 2, 1))
    apart = distance(got, want)
    return Row(
        features="log-mel",
        lookahead_ms=config.lookahead * 40,
        to_reference=apart,
        to_fixed_ratio=apart,
        block_start=distance(got, want, 0),
        block_end=distance(got, want, 3),
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| features | look-ahead | to the reference | to the fixed ratio | start of blocks | end of blocks |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ahead = "all" if row.lookahead_ms is None else f"{row.lookahead_ms} ms"
        numbers = (row.to_reference, row.to_fixed_ratio, row.block_start, row.block_end)
        cells = " | ".join("0 (exact)" if number == 0 else f"{number:.4f}" for number in numbers)
        lines.append(f"| {row.features} | {ahead} | {cells} |")
    return "\n".join(lines)


def load_model(name: str) -> Wav2Vec2:
    """The speech encoder of a converted model folder."""
    folder = model_folder(name)
    config = load_config(folder).speech
    if config is None:
        raise UserError(f"{folder} listens to log-mel features, which stream exactly")
    abstract = jax.eval_shape(lambda config=config: Wav2Vec2(config, rngs=nnx.Rngs(0)))
    return restore_component(folder, "speech", abstract)


def random_model(options: argparse.Namespace) -> Wav2Vec2:
    config = Wav2Vec2Config(
        layers=options.layers,
        width=options.width,
        ffn_width=4 * options.width,
        heads=max(1, options.width // 64),
        conv_width=(options.conv_width,) * 7,
    )
    return Wav2Vec2(config, rngs=nnx.Rngs(0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="converted model folder; default: random weights")
    parser.add_argument("--layers", type=int, default=6, help="of the random network")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--conv-width", type=int, default=96)
    parser.add_argument("--audio", type=Path, nargs="+", help="recordings; default: synthetic voices")
    parser.add_argument("--recordings", type=int, default=3, help="how many synthetic ones")
    parser.add_argument("--seconds", type=float, default=24.0, help="of each recording")
    parser.add_argument("--context-frames", type=int, default=125, help="video frames of the past")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args()

    model = load_model(options.model) if options.model else random_model(options)
    speech = model.config
    length = int(options.seconds * SAMPLE_RATE)
    if options.audio:
        sounds = [load_sound(path).samples[:length] for path in options.audio]
    else:
        sounds = [recording(index, "heldout", options.seconds) for index in range(options.recordings)]
    if short := [len(sound) for sound in sounds if len(sound) < SAMPLE_RATE]:
        raise UserError(f"a recording of {short[0]} samples is too short to compare; give 1 second at least")

    rows = measure(model, sounds, options.context_frames)
    weights = f"weights of {options.model}" if options.model else "random weights"
    seconds = sum(map(len, sounds)) / SAMPLE_RATE
    print(f"{speech.layers} layers of width {speech.width}, {weights}; {len(sounds)} recordings,", end=" ")
    print(f"{seconds:.0f} s\n")
    print(table(rows))
    times = [f"{row.lookahead_ms} ms: {row.ms_per_block:.0f} ms" for row in rows if row.ms_per_block]
    print(f"\nTime to compute a block of 12 frames, by look-ahead, on {jax.devices()[0].device_kind}:")
    print(", ".join(times))
    if options.json:
        values = {
            "model": dataclasses.asdict(speech),
            "weights": weights,
            "seconds": seconds,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        write_text(options.json, json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
