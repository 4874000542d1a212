"""How long a user waits: time to first frame, and silence to speech, with what each part costs.

    python tools/bench_session.py [--devices 1,5] [--early none,0,1,2] [--microphone] [--json FILE]

Real sessions on the real clock. After some seconds of silence a second of speech is pushed at once, as from a
text-to-speech system (or, with --microphone, as it is spoken), and the time is taken until the block with the
first speaking frame is out. Run it on an idle machine.

`shown` is later than `out` by what the picture has to wait for its turn: frames are shown 40 ms apart, so a
block that is out early waits until the one before it has been shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import configure_jax, run
from lavatar_jax.files import write_text

configure_jax()  # before jax is imported

import numpy as np
from rich.console import Console
from rich.table import Table

from lavatar_jax.errors import UserError
from lavatar_jax.inference.output import check_output

RATE = 16_000


def say(session: Any, samples: np.ndarray, microphone: bool) -> None:
    """Pushes speech at once, or as it is spoken: in pieces of 20 ms."""
    if not microphone:
        session.push_audio(samples)
    else:
        start = time.monotonic()
        for piece in range(0, len(samples), 320):
            time.sleep(max(0.0, start + (piece + 320) / RATE - time.monotonic()))
            session.push_audio(samples[piece : piece + 320])
    session.end_of_speech()


def one_session(host: Any, face: Path, early: int | None, pause: float, microphone: bool) -> dict[str, float]:
    """Opens a session, lets it idle, says something: the waits in seconds."""
    speech = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    schedule = -np.inf  # when the video would have to begin on the screen for no frame to be late
    with host.open(face, early_exit=early) as session:
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if (block := session.read(timeout=0.02)) and not block.held:
                schedule = max(schedule, time.monotonic() - block.time)
        speaker = threading.Thread(target=say, args=(session, speech, microphone))
        speaker.start()
        while not session.stats.silence_to_speech:
            block = session.read(timeout=10)
            if block is None:
                raise SystemExit("no speech came out within 10 s: the machine is too slow or too busy")
            if not block.held:
                schedule = max(schedule, time.monotonic() - block.time)
        read = time.monotonic()
        latency = block.latency
        heard, parts = latency.first_speech, latency.parts()
        speaker.join()
        return {
            "first frame": session.stats.first_frame,
            "to speech": session.stats.silence_to_speech[0],
            "shown": max(schedule + block.time, read) - heard,
            "waiting": latency.taken - heard,
            "features": parts["features"] + parts["feed"],
            "stages": sum(value for name, value in parts.items() if name.startswith("stage")),
            "first part": parts["decode"],
        }


def measure(
    model: str, devices: int, exits: list[int | None], repeats: int, microphone: bool, parts: int
) -> list[Any]:
    """A row for each early exit: median and best in milliseconds, in a process with so many devices.

    Cases take turns, so that what else the machine does troubles all of them alike.
    """
    from lavatar_jax.checkpoints.store import load_model_folder
    from lavatar_jax.inference.generate import SAMPLES
    from lavatar_jax.inference.session_host import SessionHost
    from lavatar_jax.parallel import layout_for

    avatar = load_model_folder(model)
    host = SessionHost(avatar, layout=layout_for(devices, avatar.config.sampling.steps), parts=parts)
    host.start()
    face = SAMPLES / "face.png"
    rng = np.random.default_rng(1)
    for early in exits:  # compiles
        one_session(host, face, early, 2.0, False)
    found: dict[int | None, list[dict[str, float]]] = {early: [] for early in exits}
    for _ in range(repeats):
        pause = 1.5 + rng.uniform(0, 0.48)  # speech begins anywhere in a block
        for early in exits:
            found[early].append(one_session(host, face, early, pause, microphone))
    tick = tick_ms(host)
    host.close()
    rows = []
    for early, waits in found.items():
        row: dict[str, Any] = {"devices": devices, "early": early}
        for name in waits[0]:
            values = [1e3 * wait[name] for wait in waits]
            row[name] = f"{median(values):.0f} ({min(values):.0f})"
        rows.append({**row, "tick": tick})
    return rows


def tick_ms(host: Any) -> float:
    """One tick of an idle pipeline: what every stage costs when nobody needs it."""
    import jax

    times = []
    with host._loop.lock:
        for _ in range(10):
            start = time.perf_counter()
            host.pipeline.tick()
            jax.block_until_ready(host.pipeline.rings[0].k)
            times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--devices", default="1,5", help="numbers of (on CPU: virtual) devices")
    parser.add_argument("--early", default="none,0,1,2", help="stages at which a first block is shown")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", type=int, default=3, help="in which blocks are handed out")
    parser.add_argument("--microphone", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json:
        check_output(args.json, ".json")
    if not all(part.isdigit() for part in args.devices.split(",")):
        raise UserError(f"--devices {args.devices}: give numbers of devices, such as 1,5")
    exits = [None if early == "none" else int(early) for early in args.early.split(",")]
    if args.case:
        exits = exits if args.case > 1 else exits[:1]
        rows = measure(args.model, args.case, exits, args.repeats, args.microphone, args.parts)
        print(json.dumps(rows))
        return 0

    results: list[dict[str, Any]] = []
    for devices in args.devices.split(","):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        command = [sys.executable, __file__, "--model", args.model, "--repeats", str(args.repeats)]
        command += [
            "--early",
            args.early,
            "--parts",
            str(args.parts),
            *["--microphone"] * args.microphone,
            "--case",
            devices,
        ]
        child = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE)
        if child.returncode:
            return child.returncode
        results += json.loads(child.stdout.splitlines()[-1])
    title = "Waits in ms, median (best); speech " + (
        "as it is spoken" if args.microphone else "pushed at once"
    )
    table = Table(*results[0], title=title)
    for result in results:
        table.add_row(*("-" if value is None else str(value) for value in result.values()))
    Console(width=140).print(table)
    if args.json:
        about = {"cores": os.cpu_count(), "python": platform.python_version()}
        about |= {"microphone": args.microphone, "parts": args.parts}
        write_text(args.json, json.dumps({**about, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
