"""How often the watermark is found where it is, and where it is not, after H.264 and scaling.

    python tools/measure_watermark.py [--clips 8] [--frames 25] [--keys 1000]

Clips are rendered faces of 512x512, smooth in every second one and in front of moving 1/f texture with
grain in the others: nothing hides a mark better from a detector. Every clip goes through every channel twice,
marked and not; the unmarked ones are searched with the public key and with `keys` other ones.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import parse_options, run
from lavatar_jax.data.faces import draw_identity, random_motion, render
from lavatar_jax.serving.watermark import Detection, Watermark, coefficients

SIZE = 512
draw = jax.jit(render, static_argnums=2)
RATES = ("1500k", "600k", "300k", "150k")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Print detection and false-positive rates as a table."""

    clips: int = 8
    frames: int = 25
    keys: int = 1000


@dataclass
class Tally:
    """What was said of one channel's marked and unmarked videos."""

    marked: list[Detection] = field(default_factory=list)
    unmarked: list[Detection] = field(default_factory=list)

    def row(self) -> str:
        found, alarms = (sum(d.present for d in judged) for judged in (self.marked, self.unmarked))
        lowest, highest = min(d.score for d in self.marked), max(d.score for d in self.unmarked)
        searches = len(self.unmarked)
        return f"{found} of {len(self.marked)} | {lowest:.1f} | {alarms} of {searches:,} | {highest:.1f}"


def through_h264(frames: np.ndarray, **options: str) -> np.ndarray:
    """Frames uint8 [T, H, W, 3], encoded by x264 with these options at 25 frames/s, and decoded."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as encoded:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in encoded.decode(video=0)])


def scaled(frames: np.ndarray, side: int) -> np.ndarray:
    """Frames uint8 [T, side, side, 3]."""
    images = [Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in images])


def live(rate: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda frames: through_h264(frames, b=rate, tune="zerolatency", g="25")


CHANNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda frames: frames,
    "recording, crf 18": lambda frames: through_h264(frames, crf="18"),
    **{f"live, {rate}bit/s": live(rate) for rate in RATES},
    "512 to 480 to 512, live, 600kbit/s": lambda frames: live("600k")(scaled(scaled(frames, 480), SIZE)),
    "to 256, live, 300kbit/s": lambda frames: live("300k")(scaled(frames, 256)),
}


def texture(seed: int) -> np.ndarray:
    """Noise [SIZE, SIZE] with the 1/f spectrum of photographs, 20 grey levels (RMS)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE)))
    white = np.fft.fft2(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))
    noise = np.fft.ifft2(white / np.maximum(frequency, 1 / SIZE)).real
    return 20 * noise / noise.std()


def make_clip(seed: int, frames: int) -> np.ndarray:
    """A person of the heldout split who moves at random: uint8 [T, SIZE, SIZE, 3]."""
    motion = random_motion(jax.random.key(seed), frames)
    clip = 127.5 + 127.5 * np.asarray(draw(draw_identity(seed, "heldout"), motion, SIZE))
    if seed % 2:
        grain, pattern = np.random.default_rng(seed), texture(seed)
        for t in range(frames):
            noise = np.roll(pattern, t // 3, axis=1) + 1.5 * grain.normal(size=(SIZE, SIZE))
            clip[t] += noise[..., None]
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8)


def main(args: list[str]) -> None:
    options = parse_options(Measure, args, prog="tools/measure_watermark.py")
    mark, others = Watermark(), [Watermark(key=b"%d" % key) for key in range(options.keys)]
    tally = {name: Tally() for name in CHANNELS}
    quality, seconds = [], []
    for seed in range(options.clips):
        clip = make_clip(seed, options.frames)
        mark.embed(clip[:1])  # makes the pattern
        start = time.perf_counter()
        marked = np.concatenate([mark.embed(clip[t : t + 12]) for t in range(0, len(clip), 12)])
        seconds.append((time.perf_counter() - start) / len(clip))
        quality.append(10 * math.log10(255**2 / np.mean((marked.astype(float) - clip) ** 2)))
        for name, channel in CHANNELS.items():
            tally[name].marked.append(mark.detect(channel(marked)))
            values = coefficients(channel(clip))
            tally[name].unmarked += [watermark.judge(values) for watermark in (mark, *others)]
    print("| channel | found | lowest score | false alarms | highest score unmarked |")
    print("|---|---|---|---|---|")
    for name, result in tally.items():
        print(f"| {name} | {result.row()} |")
    print(f"PSNR {min(quality):.1f} to {max(quality):.1f} dB, {1000 * np.median(seconds):.2f} ms a frame")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
