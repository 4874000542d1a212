"""The paper's ablations at the scale of the small model, on held-out faces and voices with known truth.

    python tools/ablate.py --student FOLDER [--forcing FOLDER] [--model NAME=FOLDER ...] [--out runs/ablation]

`--student` is the model after stage 2 (default: the shipped one), `--forcing` the one after stage 1. Each
variant is measured with several seeds; results are kept one by one, so an interrupted call goes on where it
was, and a call with a longer `--drift-seconds` for some variants (`--only`) adds what they lack. Writes
ablation.md (mean and spread of every column) and ablation.png (colour error over time).

What is switched off at sampling was trained with it switched on; only models named by --model were trained
otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.checkpoints.store import load_model_folder, model_folder
from lavatar_jax.cli import run
from lavatar_jax.data.talking_clips import Clip
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.performance import (
    clip_audio,
    glimpses,
    held_out_clips,
    stream,
    talk_clips,
    with_sampling,
)
from lavatar_jax.evaluation.probe import FaceProbe
from lavatar_jax.evaluation.talking import Numbers, colour_numbers, identity_error, speech_numbers
from lavatar_jax.files import write_text
from lavatar_jax.models.avatar import Avatar

MOMENTS = (10.0, 100.0, 1000.0, 10_000.0)  # seconds at which the colour error is read
COLUMNS = {
    "openness": ("lip-sync", 3),
    "lag": ("lag", 1),
    "openness_variance": ("opening variance", 2),
    "head_motion": ("head motion", 2),
    "blinks": ("blinks/min", 1),
    "sharpness": ("sharpness", 2),
    "colour": ("colour error", 1),
    "flicker": ("flicker", 2),
    **{f"at_{moment:.0f}": (f"colour at {moment:.0f} s", 1) for moment in MOMENTS},
    "fps": ("frames/s", 0),
    "ttff": ("TTFF, ms", 0),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and what is changed about its sampling."""

    name: str
    model: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def variants(student: str, forcing: str | None, others: dict[str, str]) -> Iterator[Variant]:
    if forcing is not None:
        yield Variant("stage 1, 40 steps", forcing, {"steps": 40, "doubly_shifted": False})
        yield Variant("stage 1, 4 steps", forcing)
    yield Variant("stage 2, as shipped", student)
    for name, folder in others.items():
        yield Variant(name, folder)
    yield Variant("adaptive sink after block 1", student, {"adapt_sink_after": 1})
    yield Variant("no rolling RoPE", student, {"rolling_rope": False})
    yield Variant("no sink", student, {"sink": False})
    yield Variant("clean history", student, {"history": "clean"})
    yield Variant("fixed-noise history", student, {"history": "fixed_noise"})
    for steps in (1, 2, 3):
        yield Variant(f"{steps} step{'s' * (steps > 1)}", student, {"steps": steps})
    for frames in (1, 2, 4):  # with as much history: 12 latents, this block among them
        changes = {"block_frames": frames, "ring_blocks": 12 // frames}
        yield Variant(f"block of {frames} latents", student, changes)


def speed(avatar: Avatar, clip: Clip) -> Numbers:
    """Frames a second and time to the first frames of one person; compiled before."""
    for _ in range(2):
        start = time.perf_counter()
        first, count = 0.0, 0
        for block in stream(avatar, [clip], clip_audio(avatar, [clip])):
            count += np.asarray(block.frames).shape[1]
            first = first or time.perf_counter() - start
    total = time.perf_counter() - start
    return {"fps": count / total, "ttff": 1000 * first}


def drift(avatar: Avatar, clips: list[Clip], speech: Path, moments: list[float], seed: int) -> Numbers:
    """Colour error before each of the moments of a long video."""
    return {
        f"at_{moment:.0f}": float(np.mean([identity_error(v, c) for v, c in zip(frames, clips, strict=True)]))
        for moment, frames in glimpses(avatar, clips, speech, max(moments), moments, seed=seed)
    }


def measure(
    variant: Variant,
    seed: int,
    clips: list[Clip],
    probes: list[FaceProbe],
    arguments: argparse.Namespace,
    known: Numbers,
) -> Iterator[Numbers]:
    """The columns that are not `known` yet, in parts."""
    moments = [moment for moment in MOMENTS if moment <= arguments.drift_seconds]
    talks, drifts = "openness" not in known, any(f"at_{moment:.0f}" not in known for moment in moments)
    runs = "fps" not in known and not arguments.no_speed
    if not (talks or runs or drifts):
        return
    avatar = with_sampling(load_model_folder(variant.model), **variant.changes)
    if talks:
        videos = talk_clips(avatar, clips, seed=seed)
        yield speech_numbers(videos, clips, probes) | colour_numbers(videos, clips)
    if runs:
        yield speed(avatar, clips[0])
    if drifts:
        yield drift(avatar, clips[: arguments.drift_people], arguments.speech, moments, seed)


@functools.cache
def digest(model: str) -> str:
    """Of everything in a model folder but what is told about it."""
    digest, folder = hashlib.sha256(), model_folder(model)
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".md"):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def measured(file: Path, about: dict[str, Any], missing: Callable[[Numbers], Iterator[Numbers]]) -> Numbers:
    """The numbers in a file of results, and what is `missing` of them: every part is kept as it comes.

    `about`: all that they depend on. Raises UserError where the file has results about something else.
    """
    about = json.loads(json.dumps(about))  # as it comes back from a file
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"about": about, "numbers": {}}
    if kept.get("about") != about:
        raise UserError(f"{file} has results of another model or other settings: choose another --out")
    known: Numbers = kept["numbers"]
    for numbers in missing(known):
        known |= numbers
        write_text(file, json.dumps(kept, indent=1))
    return known


def spread(results: dict[str, list[Numbers]]) -> str:
    """A table of mean ± standard deviation over seeds; of one seed, its number alone."""
    shown = {
        name: column
        for name, column in COLUMNS.items()
        if any(name in run for runs in results.values() for run in runs)
    }
    lines = [
        "| | " + " | ".join(label for label, _ in shown.values()) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for variant, runs in results.items():
        cells = []
        for name, (_, digits) in shown.items():
            values = [run[name] for run in runs if name in run]
            told = f"{np.mean(values):.{digits}f}" if values else "-"
            cells.append(f"{told} ± {np.std(values):.{digits}f}" if len(values) > 1 else told)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[Numbers]], path: Path) -> None:
    """Colour error at the moments, one line a variant of two or more of them, with the range over seeds.

    No picture without such a variant, or without matplotlib.
    """
    read = {
        variant: [moment for moment in MOMENTS if all(f"at_{moment:.0f}" in run for run in runs)]
        for variant, runs in results.items()
    }
    lines = {variant: moments for variant, moments in read.items() if len(moments) > 1}
    if not lines:
        return
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print(f"no {path}: pip install 'lavatar-jax[plots]' for the picture", file=sys.stderr)
        return
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    for variant, moments in lines.items():
        values = np.array([[run[f"at_{moment:.0f}"] for moment in moments] for run in results[variant]])
        (line,) = axes.plot(moments, values.mean(axis=0), marker="o", label=variant)
        axes.fill_between(moments, values.min(axis=0), values.max(axis=0), alpha=0.15, color=line.get_color())
    axes.set(xscale="log", xlabel="seconds of video", ylabel="colour error (of 255)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="tiny", help="model after stage 2")
    parser.add_argument("--forcing", help="model after stage 1")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="one more model")
    parser.add_argument(
        "--only", action="extend", nargs="+", help="measure variants with one of these in their name"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=6, help="people, 10 s each")
    parser.add_argument("--drift-seconds", type=float, default=100.0)
    parser.add_argument("--drift-people", type=int, default=4)
    parser.add_argument("--no-speed", action="store_true", help="for when other work keeps the machine busy")
    parser.add_argument("--speech", type=Path, default=Path("runs/speech"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parsed = parser.parse_args(arguments)
    if any("=" not in model for model in parsed.model):
        raise UserError("--model takes NAME=FOLDER")
    return parsed


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    others = dict(model.split("=", 1) for model in options.model)
    known = list(variants(options.student, options.forcing, others))
    if taken := [name for name in others if sum(variant.name == name for variant in known) > 1]:
        raise UserError(f"--model {taken[0]}: a variant has this name already; give another")
    chosen = [
        variant for variant in known if not options.only or any(part in variant.name for part in options.only)
    ]
    if not chosen:
        raise UserError(f"no variant has {' or '.join(options.only)} in its name")
    options.out.mkdir(parents=True, exist_ok=True)
    avatar = load_model_folder(options.student)
    clips = held_out_clips(avatar, options.clips, 21, options.speech)
    probes = [FaceProbe.calibrate(clip.identity, clip.video.shape[1]) for clip in clips]
    results: dict[str, list[Numbers]] = {}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(chosen) * options.seeds)
        for variant in chosen:
            for seed in range(options.seeds):
                bar.update(task, description=f"{variant.name}, seed {seed}")
                file = options.out / f"{variant.name.replace(' ', '-').replace(',', '')}.{seed}.json"
                about = {
                    "model": digest(variant.model),
                    "changes": variant.changes,
                    "people": [options.clips, options.drift_people],
                    "speech": str(options.speech),
                }
                missing = functools.partial(measure, variant, seed, clips, probes, options)
                numbers = measured(file, about, missing)
                results.setdefault(variant.name, []).append(numbers)
                bar.advance(task)
            jax.clear_caches()  # its programs serve no other variant, and a process can map only so many
    table = spread(results)
    write_text(options.out / "ablation.md", table)
    draw(results, options.out / "ablation.png")
    print(table)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
