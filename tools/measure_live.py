"""What a viewer of a live server gets: frames/s, first frame, waits, and whether sound and picture drift.

    python serve.py live                                   # in another terminal
    python tools/measure_live.py [--url URL] [--seconds 600] [--json FILE]

A client that speaks the bundled recording again and again, with pauses, over WebRTC, and measures what it
receives. Run it on a machine with nothing else to do: it decodes the video too, on the same cores. Ctrl-C
ends it sooner: what was measured until then is reported, and the exit code is 130.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import time
import urllib.error
import urllib.request
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from lavatar_jax.cli import run
from lavatar_jax.errors import UserError
from lavatar_jax.files import write_text
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.inference.sound import read_sound
from lavatar_jax.serving.media_webrtc import offer_loopback

RATE, PIECE = 48_000, 960
PAUSE = 2.5  # seconds between sentences
WINDOW = 5.0  # seconds over which the ages of frames are averaged


class Microphone(MediaStreamTrack):
    """The bundled recording without end, as it would be spoken."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        speech = np.concatenate([p[0] for p in read_sound(SAMPLES / "voice.flac", rate=RATE, channels=1)])
        self._speech = np.concatenate([np.zeros(int(PAUSE * RATE), np.float32), speech])
        self._count, self._start = 0, time.monotonic()

    async def recv(self) -> av.AudioFrame:
        await asyncio.sleep(max(0.0, self._start + self._count * PIECE / RATE - time.monotonic()))
        at = np.arange(self._count * PIECE, (self._count + 1) * PIECE)
        samples = (32767 * self._speech[at % len(self._speech)]).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self._count * PIECE, Fraction(1, RATE)
        self._count += 1
        return frame


class Received:
    """When frames came, and how old they were by the clock that they carry."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.ages: list[float] = []

    def add(self, frame: Any) -> None:
        now = time.monotonic()
        self.arrivals.append(now)
        self.ages.append(now - float(frame.pts * frame.time_base))

    def windows(self) -> dict[int, float]:
        """The median age in each window of time."""
        found: dict[int, list[float]] = {}
        for arrival, age in zip(self.arrivals, self.ages, strict=True):
            found.setdefault(int(arrival / WINDOW), []).append(age)
        return {window: median(ages) for window, ages in found.items()}


def request(url: str, path: str, body: bytes, headers: dict[str, str], method: str = "POST") -> Any:
    key = {"X-API-Key": os.environ["LAVATAR_API_KEY"]} if "LAVATAR_API_KEY" in os.environ else {}
    asked = urllib.request.Request(url.rstrip("/") + path, body, headers | key, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError:
        raise
    except urllib.error.URLError as error:
        raise UserError(
            f"no server answers at {url} ({error.reason}): python serve.py live starts one"
        ) from None


async def measure(url: str, seconds: float) -> dict[str, Any]:
    """Cancelled while it measures, it reports what it has, with `interrupted_after_seconds`."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    received = {"video": Received(), "audio": Received()}
    stats: list[dict[str, Any]] = []
    tasks = []

    async def receive(track: MediaStreamTrack) -> None:
        with contextlib.suppress(MediaStreamError):
            while True:
                received[track.kind].add(await track.recv())

    def told(text: str) -> None:
        event = json.loads(text)
        if event["type"] == "stats":
            stats.append(event["stats"])

    peer.createDataChannel("events").on("message", told)
    peer.addTrack(Microphone())
    peer.addTransceiver("video", "recvonly")
    peer.on("track", lambda track: tasks.append(asyncio.ensure_future(receive(track))))

    begin = time.monotonic()
    answer = await asyncio.to_thread(
        request, url, "/v1/sessions", b"{}", {"Content-Type": "application/json"}
    )
    session = json.loads(answer)
    opened = time.monotonic() - begin
    bearer = {"Authorization": f"Bearer {session['token']}"}
    await peer.setLocalDescription(await peer.createOffer())
    offer = peer.localDescription.sdp.encode()
    headers = bearer | {"Content-Type": "application/sdp"}
    sdp = await asyncio.to_thread(request, url, session["media"]["call"], offer, headers)
    await peer.setRemoteDescription(RTCSessionDescription(sdp.decode(), "answer"))
    measuring, interrupted = time.monotonic(), {}
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:  # what Ctrl-C comes to
        interrupted = {"interrupted_after_seconds": round(time.monotonic() - measuring, 1)}
    await asyncio.to_thread(request, url, f"/v1/sessions/{session['id']}", b"", bearer, "DELETE")
    for task in tasks:
        task.cancel()
    await peer.close()
    if interrupted and not stats:
        raise KeyboardInterrupt  # there is nothing to report yet
    return report(received, stats, begin, opened) | interrupted


def report(
    received: dict[str, Received], stats: list[dict[str, Any]], begin: float, opened: float
) -> dict[str, Any]:
    video, sound = received["video"], received["audio"]
    if min(len(video.arrivals), len(sound.arrivals)) < 2 or not stats:
        raise SystemExit("no video or no sound came: is the server's log clear about why?")
    ages, heard = video.windows(), sound.windows()
    skew = [ages[window] - heard[window] for window in sorted(ages.keys() & heard.keys())]
    span = video.arrivals[-1] - video.arrivals[0]
    gaps = np.diff(video.arrivals)
    waits = [s["silence_to_speech_ms"] for s in stats if s["silence_to_speech_ms"] is not None]
    blocks = [s["block_ms"] for s in stats if s["block_ms"]]
    last = stats[-1]
    return {
        "seconds": round(span, 1),
        "frames_per_second": round((len(video.arrivals) - 1) / span, 3),
        "opened_ms": round(1e3 * opened),
        "first_frame_received_ms": round(1e3 * (video.arrivals[0] - begin)),
        "first_frame_sent_ms": last["first_frame_ms"],
        "drift_of_sound_to_picture_ms": round(1e3 * max((abs(v - skew[0]) for v in skew), default=0.0), 1),
        "longest_gap_ms": round(1e3 * float(gaps.max())),
        "underruns": last["underruns"],
        "underruns_of_frames_percent": round(100 * last["underruns"] / (25 * span), 3),
        "held_blocks": last["held"],
        "silence_to_speech_ms": round(median(waits)) if waits else None,
        "block_ms": round(median(blocks), 1) if blocks else None,
        "parts_ms": {
            name: round(median(s["parts_ms"].get(name, 0.0) for s in stats), 1) for name in last["parts_ms"]
        },
        "kbit_per_second": round(8e-3 * last["bytes"] / span),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8765")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    offer_loopback()
    try:
        found = asyncio.run(measure(args.url, args.seconds))
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return 130
    found |= {"cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(found, indent=1))
    if args.json:
        write_text(args.json, json.dumps(found, indent=1))
    if "interrupted_after_seconds" in found:
        after = found["interrupted_after_seconds"]
        print(f"interrupted after {after} s of {args.seconds:g} s: that is all so far", file=sys.stderr)
        return 130
    kept = found["drift_of_sound_to_picture_ms"] <= 40 and found["underruns_of_frames_percent"] < 0.1
    return 0 if kept and found["frames_per_second"] > 24.9 else 1


if __name__ == "__main__":
    sys.exit(run(main))
