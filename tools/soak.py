"""Hours of video through the session loop: does memory, time, or speed ever drift?

    python tools/soak.py [--seconds 10000] [--model tiny] [--live] [--json FILE]

As fast as it goes: one session is fed the bundled recording again and again and read at once. With --live it
is paced by a clock that jumps to the next moment at which something is due, so that pacing is tested too.
Exit code 1 if a frame is missing, sound is not what was pushed, or time drifts; speed and memory are judged
too, where the machine has nothing else to do.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import configure_jax, run

configure_jax()  # before jax is imported

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.files import write_text
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.session_host import SessionHost
from lavatar_jax.inference.sound import SAMPLE_RATE, load_sound
from lavatar_jax.models.speech_level import normalise_level

WINDOW = 100.0  # seconds of video over which speed is measured
WARM_UP = 20.0  # seconds of video before the first window: compiling, first allocations


class JumpingClock:
    """Stands still while work is done, and jumps over the waiting."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Voice:
    """A recording without end, and a check that the sound that comes out is the one that went in."""

    def __init__(self, samples: np.ndarray) -> None:
        self._samples = samples
        self.sent = self.received = 0
        self.wrong = 0

    def at(self, start: int, count: int) -> np.ndarray:
        return np.take(self._samples, np.arange(start, start + count), mode="wrap")

    def next(self, count: int) -> np.ndarray:
        return self.at(self.sent, count)

    def check(self, sound: np.ndarray) -> None:
        self.wrong += not np.array_equal(sound, self.at(self.received, len(sound)))
        self.received += len(sound)


def memory_mb() -> float:
    """What the process holds in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def soak(
    host: SessionHost, session: AvatarSession, voice: Voice, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs `seconds` of video; returns marks (one each WINDOW) and what was found."""
    block = host.avatar.config.dit.block_frames * 4 * SAMPLE_RATE // host.avatar.config.fps
    total = round(seconds * SAMPLE_RATE / block)
    marks: list[dict[str, Any]] = []
    frames, drift, next_mark = 0, 0.0, WARM_UP
    clock = host.clock if isinstance(host.clock, JumpingClock) else None  # live
    start = last = (0.0, time.perf_counter(), time.process_time())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("seconds of video", total=seconds)
        index = 0
        while index < total:
            if session.queued_seconds < 2:
                voice.sent += session.push_audio(voice.next(4 * block))
            wait = host.step()
            while index < total and (made := session.read()) is not None:
                assert made.index == index
                voice.check(made.sound)
                frames += len(made.frames)
                index += made.part == host.parts - 1
                video = made.time + len(made.frames) / host.avatar.config.fps
                drift = max(drift, abs(video - voice.received / SAMPLE_RATE))
                if clock:
                    begins = made.time - 0.04 * made.part * len(made.frames)
                    drift = max(drift, abs(begins - (clock.now - session.stats.opened)))
                if video >= next_mark:
                    now = (video, time.perf_counter(), time.process_time())
                    gc.collect()
                    marks.append(
                        {
                            "video_s": round(video, 2),
                            "memory_mb": round(memory_mb(), 1),
                            "live_arrays": len(jax.live_arrays()),
                            "times_real_time": round((now[0] - last[0]) / (now[1] - last[1]), 2),
                            "cpu_s_per_100_s": round(100 * (now[2] - last[2]) / (now[0] - last[0]), 2),
                        }
                    )
                    last = (video, time.perf_counter(), time.process_time())
                    next_mark += WINDOW
                progress.update(task, completed=video)
            if clock and 0 < wait < np.inf:
                clock.now += wait
    wall = time.perf_counter() - start[1]
    found = {
        "seconds": round(total * block / SAMPLE_RATE, 2),
        "wall_s": round(wall, 1),
        "frames": frames,
        "frames_expected": total * 12,
        "wrong_sound_blocks": voice.wrong,
        "largest_drift_s": drift,
        "held": session.stats.held,
        "underruns": session.stats.underruns,
        "dropped_frames": session.stats.dropped_frames,
    }
    return marks, found


def judge(marks: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, bool]:
    """Every promise, and whether it was kept. Marks: the first one is the warm-up."""
    checks = {
        "every frame": found["frames"] == found["frames_expected"] and not found["dropped_frames"],
        "every sample": not found["wrong_sound_blocks"] and not found["underruns"],
        "no drift": found["largest_drift_s"] < 1e-6 * max(1.0, found["seconds"]) and not found["held"],
    }
    if len(marks) > 2:
        first, last = marks[1], marks[-1]
        found["speed_last_to_first"] = round(last["times_real_time"] / first["times_real_time"], 3)
        found["cpu_last_to_first"] = round(last["cpu_s_per_100_s"] / first["cpu_s_per_100_s"], 3)
        found["memory_growth_mb"] = round(last["memory_mb"] - first["memory_mb"], 1)
        checks["same speed (10 %)"] = found["speed_last_to_first"] > 0.9 or found["cpu_last_to_first"] < 1.1
        checks["same memory (20 MB)"] = found["memory_growth_mb"] < 20
        checks["same number of arrays"] = last["live_arrays"] <= first["live_arrays"] + 8
    return checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10_000.0, help="of video (default 10,000)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--live", action="store_true", help="pace by a clock, one that never waits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    clock = JumpingClock() if args.live else time.monotonic
    host = SessionHost(load_model_folder(args.model), clock=clock)
    session = host.open(SAMPLES / "face.png", prompt="a person talking", live=args.live)
    recording = normalise_level(load_sound(SAMPLES / "voice.flac").samples)
    marks, found = soak(host, session, Voice(recording), args.seconds)
    checks = judge(marks, found)
    host.close()

    table = Table("video s", "memory MB", "arrays", "x real time", "CPU s per 100 s", title="Soak")
    shown = marks if len(marks) <= 12 else [*marks[:2], *marks[2:-1:10], marks[-1]]
    for mark in shown:
        table.add_row(*map(str, mark.values()))
    console = Console()
    console.print(table)
    for name, value in found.items():
        console.print(f"{name}: {value}", highlight=False)
    for name, kept in checks.items():
        console.print(f"{'kept' if kept else 'BROKEN'}: {name}", highlight=False)
    if args.json:
        versions = {"jax": jax.__version__, "python": platform.python_version()}
        about = {"model": args.model, "live": args.live, "cores": os.cpu_count(), **versions}
        write_text(args.json, json.dumps({**about, **found, "checks": checks, "marks": marks}, indent=1))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(run(main))
