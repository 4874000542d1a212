"""Measure the small talking model on faces, voices and sentences it never saw, against fixed bars.

    python tools/evaluate_tiny.py --speech FOLDER [--out runs/evaluation] [--clips 12] [--drift-seconds 600]

Writes report.md (the table), report.json, sheet.png (photo, generated, truth), talk.mp4 to --out and
exits with 1 if a bar is missed. The first run makes the held-out recordings (with espeak-ng and flite).
The probe is qualified on the true pictures first; what it says of generated ones is worth that much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.checkpoints.store import load_model_folder, model_folder
from lavatar_jax.data.speech import read_wav, write_corpus
from lavatar_jax.data.talking_clips import Clip, recording_paths, sample_clip
from lavatar_jax.evaluation import metrics
from lavatar_jax.evaluation.probe import FaceProbe, Reading
from lavatar_jax.evaluation.sheet import save_sheet
from lavatar_jax.inference.rollout import rollout
from lavatar_jax.inference.talk import photo_conditions
from lavatar_jax.inference.video import VideoWriter
from lavatar_jax.models.avatar import Avatar
from lavatar_jax.models.logmel import log_mel
from lavatar_jax.types import BlockInput, Conditions

FIRST_CLIP = 1000  # held-out clips below are for looking during training


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `bar` is None for numbers that are only reported."""

    name: str
    value: str
    bar: str | None = None
    passed: bool | None = None


def at_least(name: str, value: float, bar: float, digits: int = 3) -> Row:
    return Row(name, f"{value:.{digits}f}", f">= {bar}", value >= bar)


def at_most(name: str, value: float, bar: float, digits: int = 3) -> Row:
    return Row(name, f"{value:.{digits}f}", f"<= {bar}", value <= bar)


def to_byte(frame: np.ndarray) -> np.ndarray:
    return np.clip(np.round((frame + 1) * 127.5), 0, 255).astype(np.uint8)


def generate(
    avatar: Avatar, references: list[np.ndarray], prompts: list[str], audio: Iterator[Any]
) -> Iterator[np.ndarray]:
    """Several people at once, as one batch through the rollout -> frames [B, T, H, W, 3] block by block.

    `audio` yields features [B, 1, A, 12].
    """
    pieces = [photo_conditions(avatar, to_byte(r), p) for r, p in zip(references, prompts, strict=True)]
    conditions: Conditions = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pieces)
    blocks = (BlockInput(jnp.asarray(features[:, None])) for features in audio)
    for block in rollout(avatar.dit, avatar.vae, conditions, blocks, avatar.config.sampling, seed=7):
        yield np.asarray(block.frames)


def clip_blocks(clips: list[Clip]) -> Iterator[np.ndarray]:
    audio = np.stack([clip.audio for clip in clips])
    for start in range(0, audio.shape[-1], 12):
        yield audio[..., start : start + 12]


def reconstruct(avatar: Avatar, clip: Clip) -> np.ndarray:
    decode = jax.jit(lambda vae, video: jnp.clip(vae.decode(vae.encode(video)), -1, 1))
    return np.asarray(decode(avatar.vae, jnp.asarray(clip.video)[None]))[0]


def vae_rows(avatar: Avatar, clips: list[Clip], probes: list[FaceProbe]) -> list[Row]:
    psnr, mouth, opening = [], [], []
    for clip, probe in track(list(zip(clips, probes, strict=True)), description="VAE"):
        video = reconstruct(avatar, clip)
        box = np.asarray(metrics.mouth_box(clip.identity, clip.motion, video.shape[1]))
        psnr.append(metrics.psnr(video, clip.video))
        mouth.append(metrics.psnr(video, clip.video, box))
        opening.append(metrics.correlation(probe.measure(video).mouth_open, clip.motion.mouth_open))
    return [
        at_least("VAE PSNR, dB", float(np.mean(psnr)), 27, 1),
        at_least("VAE mouth box PSNR, dB", float(np.mean(mouth)), 25, 1),
        at_least("VAE openness correlation", float(np.mean(opening)), 0.88),
    ]


def colour_rows(videos: list[np.ndarray], clips: list[Clip]) -> list[Row]:
    errors = [metrics.colour_error(video, clip.identity) for video, clip in zip(videos, clips, strict=True)]
    regions = {
        name: float(np.mean([e[name].mean() for e in errors if name in e])) for name in metrics.COLOUR_REGIONS
    }
    others = [
        np.mean([e.mean() for e in metrics.colour_error(video, clips[i - 1].identity).values()])
        for i, video in enumerate(videos)
    ]
    return [
        at_most("colour error, mean of regions", float(np.mean(list(regions.values()))), 6, 1),
        *(at_most(f"colour error, {name}", value, 13, 1) for name, value in regions.items()),
        Row("colour error against a wrong identity", f"{np.mean(others):.1f}"),
    ]


def speaking_rows(readings: list[Reading], videos: list[np.ndarray], clips: list[Clip]) -> list[Row]:
    opening = [reading.mouth_open for reading in readings]
    truth = [np.asarray(clip.motion.mouth_open)[1:] for clip in clips]
    correlations = [metrics.correlation(m, t) for m, t in zip(opening, truth, strict=True)]
    lag = metrics.peak_lag(opening, truth)
    minutes = sum(len(video) for video in videos) / 25 / 60
    blinks = sum(metrics.count_blinks(reading.blink) for reading in readings) / minutes
    true_blinks = sum(metrics.count_blinks(clip.motion.blink) for clip in clips) / minutes
    sharp = [
        metrics.sharpness(v) / metrics.sharpness(c.video[1:]) for v, c in zip(videos, clips, strict=True)
    ]
    head = np.mean([metrics.head_deviation(r) for r in readings]) / np.mean(
        [metrics.head_deviation(c.motion) for c in clips]
    )
    variance = np.mean([np.var(m) for m in opening]) / np.mean([np.var(t) for t in truth])
    shuffled = metrics.shuffled_correlation(opening, truth)
    manners = [metrics.recognise_manner(reading) for reading in readings]
    smiles = np.mean([m.smile == c.manner.smile for m, c in zip(manners, clips, strict=True)])
    return [
        at_least("openness correlation, mean", float(np.mean(correlations)), 0.85),
        at_least("openness correlation, worst", float(np.min(correlations)), 0.70),
        Row("lag of the peak, frames", f"{lag}", "0", lag == 0),
        Row("shuffled audio", f"{shuffled:.3f}", "abs < 0.1", abs(shuffled) < 0.1),
        Row("sharpness against truth", f"{np.mean(sharp):.2f}"),
        Row("head-motion deviation against truth", f"{head:.2f}"),
        Row("blinks a minute (truth in these clips)", f"{blinks:.1f} ({true_blinks:.1f})"),
        Row("mouth-opening variance against truth", f"{variance:.2f}"),
        Row("smile as the prompt asks", f"{smiles:.0%}"),
    ]


def drift_rows(avatar: Avatar, clips: list[Clip], speech: Path, seconds: float) -> list[Row]:
    """Colour error over a long video, in the first and in the last five seconds."""
    sound = np.concatenate([read_wav(path) for path in recording_paths(speech, "heldout")])
    features = log_mel(sound, avatar.config.log_mel)
    total, ends = round(seconds * 25 / 12), 11  # blocks; five seconds are about 11

    def audio() -> Iterator[np.ndarray]:
        for block in range(total):
            starts = [(block * 12 + 1500 * i) % (features.shape[-1] - 12) for i in range(len(clips))]
            yield np.stack([features[..., start : start + 12] for start in starts])

    first, last, middle = [], [], []
    frames = generate(avatar, [c.reference for c in clips], [c.caption for c in clips], audio())
    for block, video in enumerate(track(frames, total=total, description="drift")):
        errors = [
            np.mean([e.mean() for e in metrics.colour_error(v, c.identity).values()])
            for v, c in zip(video, clips, strict=True)
            if block < ends or block >= total - ends or block % 25 == 0
        ]
        if block < ends:
            first.append(errors)
        elif block >= total - ends:
            last.append(errors)
        elif errors:
            middle.append(errors)
    start, end = np.mean(first, axis=0), np.mean(last, axis=0)
    return [
        Row(f"colour error, first 5 s of {seconds:.0f} s", f"{start.mean():.1f}"),
        Row("colour error, worst moment between", f"{np.mean(middle, axis=1).max():.1f}" if middle else "-"),
        at_most(
            f"growth of colour error over {seconds:.0f} s, {len(clips)} people",
            float((end - start).mean()),
            2,
            1,
        ),
    ]


def write_pictures(folder: Path, clips: list[Clip], videos: list[np.ndarray]) -> None:
    """A contact sheet of all clips, a smaller one of five people, and a video of the first with sound."""
    rows = []
    for clip, video in zip(clips, videos, strict=True):
        picked = np.linspace(0, len(video) - 1, 9).astype(int)
        rows.append(
            (f"{clip.caption}: photo, generated", np.concatenate([clip.reference[None], video[picked]]))
        )
        rows.append(("truth", np.concatenate([clip.video[:1], clip.video[1:][picked]])))
    save_sheet(rows, folder / "sheet.png")
    people = [("", pictures) for label, pictures in rows if label != "truth"]
    save_sheet(people[:5], folder / "people.png")
    sound = np.repeat(clips[0].samples, 3)[None]  # 16 to 48 kHz, good enough to listen to
    pair = np.concatenate([videos[0], clips[0].video[1:]], axis=2)
    with VideoWriter(folder / "talk.mp4", audio=iter([sound]), scale=4) as writer:
        writer.write(to_byte(pair))


def table(rows: list[Row]) -> str:
    lines = ["| metric (held out, 4 steps) | value | bar | |", "|---|---|---|---|"]
    for row in rows:
        mark = "" if row.passed is None else ("yes" if row.passed else "**no**")
        lines.append(f"| {row.name} | {row.value} | {row.bar or 'report'} | {mark} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="shipped model or model folder")
    parser.add_argument("--speech", type=Path, default=Path("runs/speech"), help="folder of recordings")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--clips", type=int, default=12, help="people, 10 s each")
    parser.add_argument("--drift-seconds", type=float, default=600.0)
    parser.add_argument("--drift-people", type=int, default=4)
    arguments = parser.parse_args()

    started = time.perf_counter()
    avatar = load_model_folder(arguments.model)
    size = avatar.config.image_size
    assert isinstance(size, int), "made for models of one size"
    if not (arguments.speech / "heldout").is_dir():
        write_corpus(arguments.speech, "heldout", 16)
    arguments.out.mkdir(parents=True, exist_ok=True)
    clips = [
        sample_clip(
            FIRST_CLIP + i, 1 + 12 * 21, size, "heldout", speech=arguments.speech, mel=avatar.config.log_mel
        )
        for i in range(arguments.clips)
    ]
    probes = [FaceProbe.calibrate(clip.identity, size) for clip in track(clips, description="probes")]
    truth = [
        metrics.correlation(p.measure(c.video).mouth_open, c.motion.mouth_open)
        for p, c in zip(probes, clips, strict=True)
    ]
    rows = [at_least("probe on ground truth: openness correlation", float(np.mean(truth)), 0.97)]
    rows += vae_rows(avatar, clips, probes)

    videos: list[np.ndarray] = []
    for start in track(range(0, len(clips), 4), description="talking"):
        group = clips[start : start + 4]
        frames = generate(
            avatar, [c.reference for c in group], [c.caption for c in group], clip_blocks(group)
        )
        videos += list(np.concatenate(list(frames), axis=1))
    readings = [probe.measure(video) for probe, video in zip(probes, videos, strict=True)]
    rows += speaking_rows(readings, videos, clips)
    rows += colour_rows(videos, clips)
    write_pictures(arguments.out, clips, videos)
    if arguments.drift_seconds:
        rows += drift_rows(avatar, clips[: arguments.drift_people], arguments.speech, arguments.drift_seconds)
    folder = model_folder(arguments.model)
    megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    rows.append(at_most("weights, MB", megabytes, 25, 1))

    text = table(rows)
    (arguments.out / "report.md").write_text(text)
    (arguments.out / "report.json").write_text(
        json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n"
    )
    print(text)
    seconds = time.perf_counter() - started
    print(f"{arguments.out}: report.md, report.json, sheet.png, people.png, talk.mp4 ({seconds:.0f} s)")
    return 0 if all(row.passed in (None, True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
