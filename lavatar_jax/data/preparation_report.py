"""`report.html` of prepared videos: what was kept, what was dropped and why, in one file without links."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:left}
figure{display:inline-block;margin:.5rem}img{display:block}figcaption{font-size:12px;color:#555}
svg{background:#f6f6f6}summary{cursor:pointer}"""
NAMED = 200  # names that are listed for a reason


def render_report(videos: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes], poses: int) -> str:
    """HTML of what became of `videos`: entries with name, seconds, fps, records, frames, pieces (each with
    face and level_db), dropped [(where, reason)] and notes. `pictures`: JPEG files by title. `poses`: records
    that have a pose."""
    records = sum(video["records"] for video in videos)
    hours = sum(video["frames"] for video in videos) / 25 / 3600
    kept = sum(1 for video in videos if video["records"])
    parts = [
        f"<p><b>{records}</b> records ({hours:.2f} hours) of <b>{kept}</b> of {len(videos)} videos; "
        f"<b>{poses}</b> records have a driving pose.</p>",
        _reasons("Dropped", [(v["name"], *drop) for v in videos for drop in v["dropped"]]),
        _reasons("Notes", [(v["name"], "", note) for v in videos for note in v["notes"]]),
        "<h2>Distributions</h2>",
        _histogram("length of videos, seconds", [v["seconds"] for v in videos if v["seconds"]]),
        _histogram("frames a second", [v["fps"] for v in videos if v["fps"]]),
        _histogram("height of the face, pixels", [p["face"] for v in videos for p in v["pieces"]]),
        _histogram("speech level, dB of full scale", [p["level_db"] for v in videos for p in v["pieces"]]),
        "<h2>Clips</h2>" if pictures else "",
    ]
    for title, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        caption = f"<figcaption>{html.escape(title)}</figcaption>"
        parts.append(f'<figure><img src="data:image/jpeg;base64,{data}" alt="">{caption}</figure>')
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Prepared videos</title>'
        f"<style>{STYLE}</style><h1>Prepared videos</h1>\n{body}\n</html>\n"
    )


def _reasons(title: str, entries: Sequence[tuple[str, str, str]]) -> str:
    """A table of reasons with counts; the names unfold. Entries are (video, where, reason)."""
    if not entries:
        return f"<h2>{title}</h2><p>Nothing.</p>"
    rows = []
    for reason, count in Counter(reason for *_, reason in entries).most_common():
        names = [f"{name}: {where}" if where else name for name, where, why in entries if why == reason]
        shown = "<br>".join(html.escape(name) for name in names[:NAMED])
        more = f"<br>and {count - NAMED} more" if count > NAMED else ""
        details = f"<details><summary>{count}</summary>{shown}{more}</details>"
        rows.append(f"<tr><td>{html.escape(reason)}</td><td>{details}</td></tr>")
    return f"<h2>{title}</h2><table>{''.join(rows)}</table>"


def _histogram(title: str, values: Sequence[float], bins: int = 24) -> str:
    if not values:
        return ""
    counts, edges = np.histogram(np.asarray(values, float), bins=bins)
    bars = "".join(
        f'<rect x="{10 * i}" y="{80 - h:.0f}" width="9" height="{h:.0f}" fill="#4a7fb5"/>'
        for i, h in enumerate(80 * counts / counts.max())
    )
    label = f"{html.escape(title)}: {edges[0]:.4g} to {edges[-1]:.4g}, median {np.median(values):.4g}"
    svg = f'<svg width="{10 * bins}" height="80">{bars}</svg>'
    return f"<figure>{svg}<figcaption>{label}</figcaption></figure>"
