"""Who computes when: spans of work by device, read from a jax profile and drawn (the paper's figure 11)."""

from __future__ import annotations

import colorsys
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image, ImageDraw, ImageFont

_HOP = re.compile(r"ppermute|collective-permute|send|recv")


@dataclasses.dataclass(frozen=True)
class Span:
    """One run of a program on one device, in seconds since the profile began.

    `start` to `end` includes waiting; `busy` is the time in which an operation other than a hop between
    devices ran. `device` is its number in the process.
    """

    program: str
    device: int
    run: int
    start: float
    end: float
    busy: float


def read_profile(folder: str | Path) -> list[Span]:
    """All runs of all programs in a folder that `jax.profiler.start_trace` wrote, in order of time.

    CPU devices are told apart by the ordinal of each operation, GPUs by their plane in the profile.
    """
    [path] = sorted(Path(folder).rglob("*.xplane.pb"))[-1:]
    operations: dict[tuple[str, int, int], list[tuple[float, float, bool]]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        numbered = re.search(r"/device:[A-Z]+:(\d+)", plane.name)
        for line in plane.lines:
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                if "hlo_module" not in stats:
                    continue
                device = int(numbered[1]) if numbered else int(stats.get("device_ordinal", 0))
                key = str(stats["hlo_module"]), device, int(stats.get("run_id", 0))
                interval = event.start_ns / 1e9, event.end_ns / 1e9
                operations.setdefault(key, []).append((*interval, bool(_HOP.match(event.name))))
    if not operations:
        return []
    origin = min(start for found in operations.values() for start, _, _ in found)
    spans = []
    for (program, device, run), found in operations.items():
        work = [(start, end) for start, end, hop in found if not hop] or [found[0][:2]]
        begin, end = min(start for start, _ in work), max(end for _, end in work)
        spans.append(Span(program, device, run, begin - origin, end - origin, union(work)))
    return sorted(spans, key=lambda span: span.start)


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Total length of intervals that may overlap."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclasses.dataclass(frozen=True)
class Bar:
    """Something that lasts, in seconds; bars of one `block` have one colour (None: grey)."""

    start: float
    end: float
    label: str = ""
    block: int | None = None


_LEFT, _TOP, _ROW, _GAP = 190, 44, 34, 10


def draw_timeline(
    title: str, rows: Sequence[tuple[str, Sequence[Bar]]], *, width: int = 1400, step: float | None = None
) -> Image.Image:
    """A row of bars for each of `rows` (name, bars) over a common axis in milliseconds.

    `step`: seconds between ticks of the axis (None: about ten of them).
    """
    bars = [bar for _, found in rows for bar in found]
    begin, end = min(bar.start for bar in bars), max(bar.end for bar in bars)
    scale = (width - _LEFT - 20) / max(end - begin, 1e-9)
    height = _TOP + len(rows) * (_ROW + _GAP) + 34
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    pen.text((10, 10), title, fill="black", font=font)

    def x(seconds: float) -> float:
        return _LEFT + (seconds - begin) * scale

    bottom = height - 30
    step = step or _round_step((end - begin) / 10)
    for number in range(int((end - begin) / step) + 1):
        at = x(begin + number * step)
        pen.line((at, _TOP - 4, at, bottom), fill="#dddddd")
        pen.text((at, bottom + 4), f"{number * step * 1e3:.0f} ms", fill="#555555", font=small, anchor="mt")
    for index, (name, found) in enumerate(rows):
        y = _TOP + index * (_ROW + _GAP)
        pen.text((10, y + _ROW / 2), name, fill="black", font=font, anchor="lm")
        for bar in found:
            box = (x(bar.start), y, max(x(bar.end), x(bar.start) + 1), y + _ROW)
            pen.rectangle(box, fill=_colour(bar.block), outline="white")
            if box[2] - box[0] > pen.textlength(bar.label, font=small) + 4:
                middle = ((box[0] + box[2]) / 2, y + _ROW / 2)
                pen.text(middle, bar.label, fill="black", font=small, anchor="mm")
    return image


def _colour(block: int | None) -> tuple[int, int, int]:
    if block is None:
        return 170, 170, 170
    red, green, blue = colorsys.hls_to_rgb(block * 0.618 % 1, 0.72, 0.65)
    return round(red * 255), round(green * 255), round(blue * 255)


def _round_step(seconds: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 1.0
    while power > seconds:
        power /= 10
    while power * 10 <= seconds:
        power *= 10
    return next((power * factor for factor in (1, 2, 5, 10) if power * factor >= seconds), power * 10)
