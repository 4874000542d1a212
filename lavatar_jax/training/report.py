"""`report.html` of a training run: curves of all logged numbers, and samples, in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavatar_jax.data.skipped import SKIPPED, SkippedLog
from lavatar_jax.files import write_text

SAMPLES = "samples"  # folder of a run; one folder a step in it
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}
WIDTH, HEIGHT = 380, 150  # pixels of a curve
SHOWN = 50  # skipped steps and records by name
POINTS = 400  # of a curve at most: means of neighbours

STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
figure { display: inline-block; margin: 0 1.5em 1.5em 0; vertical-align: top }
figcaption { margin-bottom: .3em } small { color: #777 }
svg { background: #f6f7f9 } polyline { fill: none; stroke: #2563a8; stroke-width: 1.5 }
img, video { max-width: 480px; border: 1px solid #ccc }
pre { background: #f6f7f9; padding: 1em; overflow: auto; max-height: 30em }
"""


def write_report(path: Path, run: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the report of the folder `run`, whose log has these `lines`; replaces the old one at once."""
    trained = [line for line in lines if "step" in line]
    evaluated = [line["evaluation"] for line in lines if "evaluation" in line]
    bad = [line["bad_step"]["message"] for line in lines if "bad_step" in line]
    parts = [f"<h1>{html.escape(run.name)}</h1>"]
    if trained:
        last = trained[-1]
        parts.append(f"<p>step {last['step']}, {last.get('seconds', 0):.0f} s of training</p>")
    if programs := [line["program"] for line in lines if "program" in line]:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in programs[-1].items() if name != "step")
        parts.append(f"<p>program: {html.escape(numbers)}</p>")
    parts += ["<h2>Training</h2>", *_curves(trained)]
    if evaluated:
        parts += ["<h2>Evaluation</h2>", *_curves(evaluated)]
    parts += _samples(run / SAMPLES)
    if bad:
        items = "".join(f"<li>{html.escape(message)}</li>" for message in bad[-SHOWN:])
        parts.append(f"<h2>Skipped steps ({len(bad)})</h2><ul>{items}</ul>")
    if skipped := SkippedLog(run / SKIPPED).read():
        items = "".join(
            f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in list(skipped.items())[:SHOWN]
        )
        parts.append(f"<h2>Records that could not be read ({len(skipped)})</h2><ul>{items}</ul>")
    if (run / "config.json").is_file():
        parts.append(f"<h2>Configuration</h2><pre>{html.escape((run / 'config.json').read_text())}</pre>")
    head = (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(run.name)}</title><style>{STYLE}</style>'
    )
    write_text(path, "\n".join([head, *parts]) + "\n")


def _curves(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    names = [
        name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("step", "seconds")
    ]
    for name in names:
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        if points:
            yield _curve(name, points)


def _curve(name: str, points: list[tuple[float, float]]) -> str:
    """An inline SVG; the scale is that of the 2nd to 98th percentile, so that a jump does not flatten it."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    ordered = sorted(y for _, y in means)
    low, high = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
    first, last = means[0][0], means[-1][0]
    x_scale, y_scale = WIDTH / ((last - first) or 1.0), (HEIGHT - 10) / ((high - low) or 1.0)

    def place(x: float, y: float) -> str:
        row = HEIGHT - 5 - (min(max(y, low), high) - low) * y_scale
        return f"{(x - first) * x_scale:.1f},{row:.1f}"

    line = " ".join(place(x, y) for x, y in means)
    return (
        f"<figure><figcaption>{html.escape(name)}: {points[-1][1]:.5g} "
        f"<small>{low:.4g} to {high:.4g}, steps {first:.0f} to {last:.0f}</small></figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{line}"/></svg></figure>'
    )


def _samples(folder: Path) -> Iterable[str]:
    """The files of the newest folder of samples, inside the page."""
    steps = [path for path in folder.glob("*/") if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name), default=None)
    if newest is None:
        return
    yield f"<h2>Samples of step {int(newest.name)}</h2>"
    for path in sorted(newest.iterdir()):
        if (kind := TYPES.get(path.suffix)) is None:
            continue
        source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        show = (
            f'<video controls loop src="{source}"></video>'
            if "video" in kind
            else f'<img src="{source}" alt="">'
        )
        yield f"<figure><figcaption>{html.escape(path.stem)}</figcaption>{show}</figure>"
