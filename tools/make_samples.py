"""Makes the bundled samples: held-out cartoon faces and a sentence by a free voice (needs Debian's flite).

python tools/make_samples.py
"""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
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
OTHERS = {"amira": 13, "flora": 12, "jo": 53, "nia": 40, "ruth": 47}  # to choose from on the live page
OTHERS_SMILE = 0.3  # the friendliest portrait that training showed

_render = jax.jit(render, static_argnames="size")


def draw(path: Path, person: int, smile: float | None = None) -> None:
    pose = neutral_motion(1)
    if smile is not None:
        pose = dataclasses.replace(pose, smile=jnp.asarray([smile]))
    pixels = _render(draw_identity(person, "heldout"), pose, size=512)[0]
    write_png(path, np.asarray((pixels + 1) * 127.5).round().clip(0, 255).astype(np.uint8))


def main() -> None:
    (SAMPLES / "faces").mkdir(parents=True, exist_ok=True)
    draw(SAMPLES / "face.png", PERSON)
    for name, person in OTHERS.items():
        draw(SAMPLES / "faces" / f"{name}.png", person, OTHERS_SMILE)
    with tempfile.TemporaryDirectory() as folder:
        wave = Path(folder) / "voice.wav"
        subprocess.run(["flite", "-voice", VOICE, "-t", SENTENCE, str(wave)], check=True)
        samples, rate = soundfile.read(wave, dtype="float32")
    soundfile.write(SAMPLES / "voice.flac", samples, rate)
    print(f"{SAMPLES}: face.png, faces/, voice.flac ({len(samples) / rate:.1f} s)")


if __name__ == "__main__":
    main()
