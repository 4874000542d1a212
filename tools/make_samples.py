"""Makes the bundled samples: held-out cartoon faces and a sentence by a free voice (needs Debian's flite).

python tools/make_samples.py [--out FOLDER]
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from lavatar_jax.cli import parse_options, run
from lavatar_jax.data.faces import draw_identity, neutral_motion, render
from lavatar_jax.errors import UserError
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeSamples:
    """Draw the bundled faces and speak the bundled sentence."""

    out: Path = SAMPLES
    """Where to put face.png, faces/ and voice.flac."""


def draw(path: Path, person: int, smile: float | None = None) -> None:
    pose = neutral_motion(1)
    if smile is not None:
        pose = dataclasses.replace(pose, smile=jnp.asarray([smile]))
    pixels = _render(draw_identity(person, "heldout"), pose, size=512)[0]
    write_png(path, np.asarray((pixels + 1) * 127.5).round().clip(0, 255).astype(np.uint8))


def main(args: list[str]) -> None:
    out = parse_options(MakeSamples, args, prog="tools/make_samples.py").out
    if shutil.which("flite") is None:
        raise UserError("the sentence is spoken by flite, which is not installed: apt-get install flite")
    (out / "faces").mkdir(parents=True, exist_ok=True)
    draw(out / "face.png", PERSON)
    for name, person in OTHERS.items():
        draw(out / "faces" / f"{name}.png", person, OTHERS_SMILE)
    with tempfile.TemporaryDirectory() as folder:
        wave = Path(folder) / "voice.wav"
        subprocess.run(["flite", "-voice", VOICE, "-t", SENTENCE, str(wave)], check=True)
        samples, rate = soundfile.read(wave, dtype="float32")
    soundfile.write(out / "voice.flac", samples, rate)
    print(f"{out}: face.png, faces/, voice.flac ({len(samples) / rate:.1f} s)")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
