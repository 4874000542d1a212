"""Measure the small talking model on faces, voices and sentences it never saw, against fixed bars.

    python tools/evaluate_tiny.py --speech FOLDER [--out runs/evaluation] [--clips 12] [--seeds 4]
        [--drift-seconds 600]

Every number of talking people is the mean ± standard deviation over several noises: in the two minutes of
one noise chance may double what is rare, as blinks are. Writes report.md (the table), report.json, sheet.png
(photo, generated, truth), talk.mp4 to --out and exits with 1 if a bar is missed. The first run makes the
held-out recordings (with espeak-ng and flite). The probe is qualified on the true pictures first; what it
says of generated ones is worth that much.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.checkpoints.store import load_model_folder, model_folder
from lavatar_jax.cli import run
from lavatar_jax.data.speech import write_corpus
from lavatar_jax.data.talking_clips import Clip
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.performance import glimpses, held_out_clips, talk_clips
from lavatar_jax.evaluation.probe import FaceProbe
from lavatar_jax.evaluation.sheet import save_sheet, to_uint8
from lavatar_jax.evaluation.talking import (
    Numbers,
    colour_numbers,
    identity_error,
    over_seeds,
    probe_numbers,
    speech_numbers,
    vae_numbers,
)
from lavatar_jax.files import write_text
from lavatar_jax.inference.video import VideoWriter
from lavatar_jax.models.avatar import Avatar, square_size

Bar = tuple[str, Callable[[float], bool]]  # in words, and as a test


def at_least(bar: float) -> Bar:
    return f">= {bar:g}", lambda value: value >= bar


def at_most(bar: float) -> Bar:
    return f"<= {bar:g}", lambda value: value <= bar


def between(low: float, high: float) -> Bar:
    return f"{low:g} .. {high:g}", lambda value: low <= value <= high


DRIFT_FROM = 5.0  # seconds

# name of the number -> what the table calls it, digits after the point
LABELS: dict[str, tuple[str, int]] = {
    "probe_openness": ("probe on ground truth: openness correlation", 3),
    "probe_openness_variance": ("probe on ground truth: mouth-opening variance, read / true", 2),
    "probe_head_motion": ("probe on ground truth: head motion, read / true", 2),
    "probe_blinks": ("probe on ground truth: blinks, read / true", 2),
    "probe_smile_as_asked": ("probe on ground truth: expression recognised, share", 2),
    "probe_head_as_asked": ("probe on ground truth: head motion recognised, share", 2),
    "vae_psnr": ("VAE PSNR, dB", 1),
    "vae_mouth_psnr": ("VAE mouth box PSNR, dB", 1),
    "vae_openness": ("VAE openness correlation", 3),
    "openness": ("openness correlation, mean", 3),
    "openness_worst": ("openness correlation, worst person", 3),
    "lag": ("lag of the peak, frames", 0),
    "shuffled": ("shuffled audio", 3),
    "openness_variance": ("mouth-opening variance against truth", 2),
    "sharpness": ("sharpness against truth", 2),
    "head_motion": ("head-motion deviation against truth", 2),
    "blinks": ("blinks a minute", 1),
    "partial_blinks": ("blinks a minute that close lids by a third or more", 1),
    "true_blinks": ("blinks a minute in the true clips", 1),
    "smile_as_asked": ("expression as the prompt asks, share", 2),
    "head_as_asked": ("head motion as the prompt asks, share", 2),
    "colour": ("colour error, mean of regions", 1),
    "colour_skin": ("colour error, skin", 1),
    "colour_hair": ("colour error, hair", 1),
    "colour_background": ("colour error, background", 1),
    "colour_shirt": ("colour error, shirt", 1),
    "colour_wrong_person": ("colour error against a wrong identity", 1),
    "flicker": ("flicker of the background, levels a frame", 2),
    "drift_first": ("colour error of the long video, at 5 s", 1),
    "drift_worst": ("colour error, worst moment between", 1),
    "drift": ("growth of colour error over the long video", 1),
    "megabytes": ("weights, MB", 1),
}
BARS: dict[str, Bar] = {
    "probe_openness": at_least(0.97),
    "vae_psnr": at_least(30),
    "vae_mouth_psnr": at_least(28),
    "vae_openness": at_least(0.94),
    "openness": at_least(0.91),
    "openness_worst": at_least(0.82),
    "lag": between(0, 0),
    "shuffled": between(-0.1, 0.1),
    "openness_variance": between(0.8, 1.2),
    "sharpness": between(0.9, 1.1),
    "head_motion": between(0.7, 1.3),
    "blinks": between(8, 25),
    "smile_as_asked": at_least(0.9),
    "head_as_asked": at_least(0.9),
    "colour": at_most(5),
    "colour_skin": at_most(9),
    "colour_hair": at_most(9),
    "colour_background": at_most(9),
    "colour_shirt": at_most(9),
    "drift": at_most(2),
    "megabytes": at_most(25),
}


def drift_numbers(avatar: Avatar, clips: list[Clip], speech: Path, seconds: float, seed: int) -> Numbers:
    """Colour error near the beginning and the end of a long video, and the worst between."""
    looks = glimpses(avatar, clips, speech, seconds, np.linspace(DRIFT_FROM, seconds, 21), seed=seed)
    errors = [
        float(np.mean([identity_error(v, c) for v, c in zip(frames, clips, strict=True)]))
        for _, frames in track(looks, total=21, description=f"drift over {seconds:.0f} s")
    ]
    return {"drift_first": errors[0], "drift_worst": max(errors), "drift": errors[-1] - errors[0]}


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
    pair = np.concatenate([videos[0], clips[0].video[1 : 1 + len(videos[0])]], axis=2)
    with VideoWriter(folder / "talk.mp4", audio=iter([sound]), scale=4) as writer:
        writer.write(to_uint8(pair))


def table(numbers: Numbers, spread: Numbers) -> str:
    """The numbers against their bars; with ± where there is a `spread`."""
    lines = ["| metric (held out) | value | bar | |", "|---|---|---|---|"]
    for name, (label, digits) in LABELS.items():
        if name in numbers:
            words, passed = BARS.get(name, ("report", None))
            mark = "" if passed is None else "yes" if passed(numbers[name]) else "**no**"
            told = f"{numbers[name]:.{digits}f}"
            told += f" ± {spread[name]:.{digits}f}" if name in spread else ""
            lines.append(f"| {label} | {told} | {words} | {mark} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="shipped model or model folder")
    parser.add_argument("--speech", type=Path, default=Path("runs/speech"), help="folder of recordings")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--clips", type=int, default=12, help="people, 10 s each")
    parser.add_argument("--drift-seconds", type=float, default=600.0, help="0: leave the long video out")
    parser.add_argument("--drift-people", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7, help="of the first noise")
    parser.add_argument("--seeds", type=int, default=4, help="noises with which every person talks")
    arguments = parser.parse_args()

    if arguments.clips < 2:
        raise UserError(f"--clips {arguments.clips}: people are compared with others: give at least 2")
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: give at least 1")
    if 0 < arguments.drift_seconds < 2 * DRIFT_FROM:
        raise UserError(
            f"--drift-seconds {arguments.drift_seconds:g}: give at least {2 * DRIFT_FROM:g}, or 0 for none"
        )

    started = time.perf_counter()
    avatar = load_model_folder(arguments.model)
    write_corpus(arguments.speech, "heldout", 16)  # what is missing
    arguments.out.mkdir(parents=True, exist_ok=True)
    clips = held_out_clips(avatar, arguments.clips, 21, arguments.speech)
    size = square_size(avatar)
    probes = [FaceProbe.calibrate(clip.identity, size) for clip in track(clips, description="probes")]
    numbers = probe_numbers(clips, probes) | vae_numbers(avatar.vae, clips, probes)
    runs = []
    for seed in track(range(arguments.seed, arguments.seed + arguments.seeds), description="noises"):
        videos = talk_clips(avatar, clips, seed=seed)
        runs.append(speech_numbers(videos, clips, probes) | colour_numbers(videos, clips))
        if seed == arguments.seed:
            write_pictures(arguments.out, clips, videos)
    means, spread = over_seeds(runs)
    numbers |= means
    if arguments.drift_seconds:
        people = clips[: arguments.drift_people]
        numbers |= drift_numbers(avatar, people, arguments.speech, arguments.drift_seconds, arguments.seed)
    weights = model_folder(arguments.model).glob("*.safetensors")
    numbers["megabytes"] = sum(path.stat().st_size for path in weights) / 1e6

    text = table(numbers, spread)
    write_text(arguments.out / "report.md", text)
    write_text(arguments.out / "report.json", json.dumps(numbers | {"spread": spread}, indent=2) + "\n")
    print(text)
    seconds = time.perf_counter() - started
    print(f"{arguments.out}: report.md, report.json, sheet.png, people.png, talk.mp4 ({seconds:.0f} s)")
    return 0 if all(passed(numbers[name]) for name, (_, passed) in BARS.items() if name in numbers) else 1


if __name__ == "__main__":
    sys.exit(run(main))
