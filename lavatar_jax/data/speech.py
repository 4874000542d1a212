"""Training speech from free synthetic voices (espeak-ng, flite, festival), split into training and held-out.

Held-out recordings use voices *and* sentences that training recordings never contain.
"""

import hashlib
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from lavatar_jax.data.sentences import HELDOUT_SENTENCES, TRAINING_SENTENCES
from lavatar_jax.errors import UserError
from lavatar_jax.files import replacing
from lavatar_jax.models.speech_level import normalise_level

Samples = NDArray[np.float32]

SAMPLE_RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A synthetic voice: a program, the name it gives the voice, and its usual pitch and speed."""

    program: str  # "espeak-ng", "flite" or "festival"
    name: str
    pitch: float = 1.0  # espeak-ng: 1 is its default of 50
    speed: float = 1.0


def _espeak(name: str, pitch: float = 1.0, speed: float = 1.0) -> Voice:
    return Voice(program="espeak-ng", name=name, pitch=pitch, speed=speed)


TRAINING_VOICES = (
    Voice(program="flite", name="slt"),
    Voice(program="flite", name="awb"),
    Voice(program="flite", name="kal16"),
    Voice(program="flite", name="slt", speed=0.9),
    Voice(program="flite", name="awb", speed=1.1),
    Voice(program="festival", name="cmu_us_slt_arctic_hts"),
    _espeak("en-us+m1"), _espeak("en-us+m3", 0.7, 0.9), _espeak("en-us+f1", 1.2), _espeak("en-us+f3", 1.0,
    1.1), _espeak("en-gb+m2", 0.8), _espeak("en-gb+m4", 1.1, 0.9), _espeak("en-gb+f2"), _espeak("en-gb+f5",
    1.3), _espeak("en-gb-scotland+m6", 0.9), _espeak("en-gb-scotland+f1", 1.1, 0.85), _espeak("en-gb-x-rp+m8",
    1.0, 0.95), _espeak("en-gb-x-rp+f3", 0.9),
)  # fmt: skip
HELDOUT_VOICES = (
    Voice(program="flite", name="rms"),
    _espeak("en-us+f4", 1.1),
    _espeak("en-gb+m7", 0.9),
    _espeak("en-gb-scotland+f4", 0.9, 0.95),
)


def voices_of(split: str) -> tuple[Voice, ...]:
    return {"train": TRAINING_VOICES, "heldout": HELDOUT_VOICES}[split]


def sentences_of(split: str) -> tuple[str, ...]:
    return {"train": TRAINING_SENTENCES, "heldout": HELDOUT_SENTENCES}[split]


def _command(text: str, voice: Voice, pitch: float, speed: float, out: Path) -> tuple[list[str], str | None]:
    """The command line that writes `text` to a WAV file, and what it reads from stdin."""
    if voice.program == "espeak-ng":
        numbers = ["-p", str(int(np.clip(50 * pitch, 0, 99))), "-s", str(int(160 * speed))]
        return ["espeak-ng", "-v", voice.name, *numbers, "-w", str(out), text], None
    if voice.program == "flite":
        stretch = f"duration_stretch={1 / speed:.3f}"
        return ["flite", "-voice", voice.name, "--setf", stretch, "-t", text, "-o", str(out)], None
    return ["text2wave", "-eval", f"(voice_{voice.name})", "-o", str(out)], text


def read_wav(path: Path) -> Samples:
    """A 16-bit PCM WAV file as mono float32 at 16 kHz. Raises UserError for any other file."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path}: {error}; recordings are 16-bit PCM WAV files") from None
    if width != 2:
        raise UserError(f"{path} has samples of {8 * width} bits: convert it to a 16-bit PCM WAV file")
    samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768.0
    samples = samples.reshape(-1, channels).mean(axis=1)
    if rate != SAMPLE_RATE:
        common = np.gcd(rate, SAMPLE_RATE)
        samples = resample_poly(samples, SAMPLE_RATE // common, rate // common)
    return samples.astype(np.float32)


def write_wav(path: Path, samples: Samples) -> None:
    """Writes mono float32 at 16 kHz as 16-bit PCM, never half a file. Raises UserError."""
    with replacing(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2").tobytes())


def synthesize(text: str, voice: Voice, seed: int = 0, *, cache: Path | None = None) -> Samples:
    """Speaks `text`; the seed varies pitch and speed a little. Returns mono float32 at 16 kHz.

    Args:
        cache: a folder that keeps the results.

    Raises:
        UserError: if the voice's program is not installed or fails.
    """
    path = None
    if cache is not None:
        path = cache / f"{hashlib.sha256(repr((text, voice, seed)).encode()).hexdigest()[:24]}.wav"
        if path.exists():
            return read_wav(path)
    random = np.random.default_rng([seed, 11])
    pitch, speed = voice.pitch * random.uniform(0.88, 1.12), voice.speed * random.uniform(0.88, 1.12)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speech.wav"
        command, stdin = _command(text, voice, pitch, speed, out)
        if shutil.which(command[0]) is None:
            package = "festival festvox-us-slt-hts" if voice.program == "festival" else voice.program
            raise UserError(
                f"speech needs the program {command[0]}: install it, e.g. apt-get install {package}"
            )
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
        if result.returncode or not out.exists():
            reason = result.stderr.strip().splitlines()[-1:] or ["no sound file was written"]
            raise UserError(f"{command[0]} could not speak with voice {voice.name}: {reason[0]}")
        samples = read_wav(out)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, samples)
        return read_wav(path)  # rounded to 16 bits: the same now as from the cache
    return samples


def _trim(samples: Samples) -> Samples:
    """Cuts the synthesizers' own silence at both ends."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * max(float(np.abs(samples).max(initial=0.0)), 1e-4))
    return samples[max(loud[0] - 400, 0) : loud[-1] + 800] if loud.size else samples


def recording(index: int, split: str, seconds: float = 30.0, *, cache: Path | None = None) -> Samples:
    """Recording number `index` of a split: one voice speaking sentences with pauses, at a random level over
    light noise. Deterministic by index and split. Returns float32 [seconds * 16000].
    """
    random = np.random.default_rng([index, ("train", "heldout").index(split), 5])
    voices, sentences = voices_of(split), sentences_of(split)
    voice = voices[index % len(voices)]
    total = int(seconds * SAMPLE_RATE)
    parts: list[Samples] = [np.zeros(int(random.uniform(0.0, 1.5) * SAMPLE_RATE), np.float32)]
    while sum(map(len, parts)) < total:
        text = sentences[random.integers(len(sentences))]
        spoken = normalise_level(_trim(synthesize(text, voice, int(random.integers(4)), cache=cache)))
        # Mostly short pauses, sometimes long ones: a rest of the avatar must be learned too.
        pause = random.uniform(2.0, 3.5) if random.random() < 0.1 else random.uniform(0.15, 0.9)
        parts += [
            spoken * 10 ** (random.uniform(-1.5, 1.5) / 20),
            np.zeros(int(pause * SAMPLE_RATE), np.float32),
        ]
    samples = np.concatenate(parts)[:total]
    gain = 10 ** (np.clip(random.normal(0.0, 2.5), -5.0, 5.0) / 20)
    noise = 10 ** (random.uniform(-75.0, -52.0) / 20) if random.random() < 0.7 else 0.0
    mixed = samples * gain + noise * random.standard_normal(total)
    return np.clip(mixed, -1.0, 1.0).astype(np.float32)


def write_corpus(folder: Path, split: str, count: int, seconds: float = 30.0) -> Sequence[Path]:
    """Writes recordings 0 .. count-1 of a split as `folder/split/00000.wav`; those that exist are kept."""
    paths = [folder / split / f"{index:05d}.wav" for index in range(count)]
    for index, path in enumerate(paths):
        if not path.exists():
            samples = recording(index, split, seconds, cache=folder / "sentences")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, samples)
    return paths
