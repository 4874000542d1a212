"""Sessions until a live server is full, all watched at once: does each get its frames, one more a "busy"?

    python serve.py live                                   # in another terminal
    python tools/measure_load.py [--url URL] [--seconds 60] [--json FILE]

Every session says the bundled recording again and again. Watches over WebSockets and does not decode, so that
the server has the machine nearly to itself. While they run, one more session is asked for every 3 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import websockets
from rich.console import Console
from rich.table import Table

from lavatar_jax.cli import run
from lavatar_jax.files import write_text
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.inference.sound import read_sound
from lavatar_jax.serving.media_ws import AUDIO, HEADER, INSERTED, VIDEO
from lavatar_jax.serving.uploads import to_pcm16
from tools.measure_live import request

RATE, PIECE = 16_000, 640  # samples
MOST = 64  # sessions
NEW = {"Content-Type": "application/json"}


async def open_session(url: str) -> dict[str, Any] | None:
    """None: the server is busy."""
    try:
        return json.loads(await asyncio.to_thread(request, url, "/v1/sessions", b"{}", NEW))
    except urllib.error.HTTPError as error:
        if json.load(error)["error"]["code"] == "busy":
            return None
        raise


class Watcher:
    """One session's client: speaks, and counts what comes."""

    def __init__(self, url: str, session: dict[str, Any]) -> None:
        self._where = url.replace("http", "ws", 1).rstrip("/") + session["media"]["stream"]
        self._protocols = ["lavatar.v1", f"token.{session['token']}"]
        self.arrivals: list[float] = []
        self.lost = self.inserted = 0
        self.stats: list[dict[str, Any]] = []

    async def watch(self, seconds: float) -> None:
        async with websockets.connect(self._where, subprotocols=self._protocols) as socket:  # type: ignore[arg-type]
            speaking = asyncio.create_task(self._speak(socket))
            try:
                async with asyncio.timeout(seconds):
                    await self._receive(socket)
            except TimeoutError:
                pass
            finally:
                speaking.cancel()

    async def _speak(self, socket: Any) -> None:
        speech = np.concatenate([p[0] for p in read_sound(SAMPLES / "voice.flac", rate=RATE, channels=1)])
        speech, start, count = np.concatenate([speech, np.zeros(2 * RATE)]), time.monotonic(), 0
        while True:
            await asyncio.sleep(max(0.0, start + count * PIECE / RATE - time.monotonic()))
            await socket.send(to_pcm16(speech[np.arange(count * PIECE, (count + 1) * PIECE) % len(speech)]))
            count += 1

    async def _receive(self, socket: Any) -> None:
        expected: dict[int, int] = {}
        async for message in socket:
            if isinstance(message, str):
                event = json.loads(message)
                if event["type"] == "stats":
                    self.stats.append(event["stats"])
                continue
            kind, flags, _, number, _ = HEADER.unpack(message[: HEADER.size])
            if kind == VIDEO:
                self.arrivals.append(time.monotonic())
                self.lost += number - expected.get(kind, number)
            self.inserted += kind == AUDIO and bool(flags & INSERTED)
            expected[kind] = number + 1

    def report(self) -> dict[str, Any]:
        span, first, last = self.arrivals[-1] - self.arrivals[0], self.stats[0], self.stats[-1]
        return {
            "frames_per_second": round((len(self.arrivals) - 1) / span, 2),
            "lost_frames": self.lost,
            "underruns": last["underruns"] - first["underruns"],
            "held_blocks": last["held"] - first["held"],
            "longest_gap_ms": round(1e3 * float(np.diff(self.arrivals).max())),
            "block_ms": round(float(np.median([s["block_ms"] for s in self.stats if s["block_ms"]]))),
        }


async def measure(url: str, seconds: float) -> dict[str, Any]:
    sessions: list[dict[str, Any]] = []
    refused = 0
    try:
        while len(sessions) < MOST and (session := await open_session(url)) is not None:
            sessions.append(session)
        if not sessions:
            raise SystemExit("the server is busy already: somebody else uses it")
        watchers = [Watcher(url, session) for session in sessions]
        watching = asyncio.gather(*(watcher.watch(seconds) for watcher in watchers))
        while not watching.done():
            await asyncio.wait([watching], timeout=3.0)  # seldom enough not to be told "too often"
            one_more = await open_session(url) if not watching.done() else None
            refused += one_more is None
            sessions += [one_more] if one_more else []
        await watching
    finally:
        for session in sessions:
            bearer = {"Authorization": f"Bearer {session['token']}"}
            await asyncio.to_thread(request, url, f"/v1/sessions/{session['id']}", b"", bearer, "DELETE")
    got_in = len(sessions) - len(watchers)
    return {"refused": refused, "got_in": got_in, "sessions": [watcher.report() for watcher in watchers]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8765")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = asyncio.run(measure(args.url, args.seconds))
    reports = found["sessions"]
    table = Table("session", *(name.replace("_", " ") for name in reports[0]))
    for number, report in enumerate(reports):
        table.add_row(str(number), *map(str, report.values()))
    Console().print(table)
    print(f"one more: {found['refused']} times busy, {found['got_in']} times let in")
    if args.json:
        write_text(args.json, json.dumps(found, indent=1))
    smooth = all(r["frames_per_second"] > 24.9 and not r["lost_frames"] + r["held_blocks"] for r in reports)
    return 0 if smooth and not found["got_in"] else 1


if __name__ == "__main__":
    sys.exit(run(main))
