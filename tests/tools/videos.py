"""Videos to prepare, made here, and the command that prepares them."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lavatar_jax.cli import run
from tools import prepare_data

FRAMES = 64  # of the faces that talk
OPTIONS = (
    "--workers", "0", "--blocks", "1", "--motion-frames", "5",
    "--filters.seconds", "2", "30", "--filters.reference-gap", "0.5",
)  # fmt: skip


def speech(seconds: float, level: float = 0.1) -> np.ndarray:
    """Noise as loud as speech, 16 kHz."""
    return (level * np.random.default_rng(1).normal(size=int(16_000 * seconds))).astype(np.float32)


def film(path: Path, frames: np.ndarray, sound: np.ndarray | None, *, fps: int = 25) -> Path:
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "12"})
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio = None if sound is None else container.add_stream("aac", rate=16_000, layout="mono")
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], "fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def still(path: Path, frames: int = 70) -> Path:
    """A picture that does not move, with speech."""
    picture = np.random.default_rng(0).integers(0, 255, (1, 128, 128, 3)).astype(np.uint8)
    return film(path, picture.repeat(frames, axis=0), speech(frames / 25))


def prepare(*args: str | Path) -> int:
    """The command's exit code."""
    return run(lambda: prepare_data.main([str(arg) for arg in args]))


def told(out: Path) -> list[str]:
    """The videos that are done with."""
    return [json.loads(line)["name"] for line in (out / "videos.jsonl").read_text().splitlines()]
