"""Makes the bundled sample: a held-out cartoon face and a sentence by a free voice (needs Debian's flite).

python tools/make_samples.py
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
import soundfile

from lavatar_jax.data.faces import draw_identity, neutral_motion, render
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.inference.output import write_png

SENTENCE = (
    "Hello! A moment ago I was only a picture. Now I can talk, and I will go on for as long as you like."
)
VOICE = "rms"  # like the face, never heard in training
PERSON = 5  # of the held-out identities


def main() -> None:
    SAMPLES.mkdir(exist_ok=True)
    pixels = jax.jit(render, static_argnames="size")(
        draw_identity(PERSON, "heldout"), neutral_motion(1), size=512
    )[0]
    write_png(SAMPLES / "face.png", np.asarray((pixels + 1) * 127.5).round().clip(0, 255).astype(np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        wave = Path(folder) / "voice.wav"
        subprocess.run(["flite", "-voice", VOICE, "-t", SENTENCE, str(wave)], check=True)
        samples, rate = soundfile.read(wave, dtype="float32")
    soundfile.write(SAMPLES / "voice.flac", samples, rate)
    print(f"{SAMPLES}: face.png, voice.flac ({len(samples) / rate:.1f} s)")


if __name__ == "__main__":
    main()
