"""Text to speech as a plug-in: a program that is installed here, or a service that speaks HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float

from lavatar_jax.errors import UserError
from lavatar_jax.models.speech_level import normalise_level
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.uploads import decode_sound

PATIENCE = 60.0  # seconds for one text
LARGEST = 50 << 20  # bytes of an answer
LONGEST = 600.0  # seconds of speech


class TextToSpeech(Protocol):
    """`voices`: names that `speak` takes, the default first."""

    name: str
    voices: tuple[str, ...]

    def speak(self, text: str, voice: str) -> Float[np.ndarray, " n"]:
        """Mono speech of 16 kHz at the usual level. Blocks. Raises ApiError 502 when it cannot."""
        ...


class Flite:
    name = "flite"
    voices: tuple[str, ...] = ("slt", "rms", "awb", "kal")

    def speak(self, text: str, voice: str) -> Float[np.ndarray, " n"]:
        return _run(["flite", "-voice", voice, "-f", "{text}", "-o", "{sound}"], text)


class Festival:
    name = "festival"
    voices: tuple[str, ...] = ("default",)

    def speak(self, text: str, voice: str) -> Float[np.ndarray, " n"]:
        return _run(["text2wave", "{text}", "-o", "{sound}"], text)


class HttpSpeech:
    """A service that answers `POST {"input", "voice", "model", "response_format": "wav"}` with a sound file,
    as OpenAI's speech endpoint and its many look-alikes do. LAVATAR_TTS_KEY is sent as a bearer token."""

    name = "http"

    def __init__(self, url: str, voices: tuple[str, ...] = ("alloy",)) -> None:
        self._url, self.voices = url, voices

    def speak(self, text: str, voice: str) -> Float[np.ndarray, " n"]:
        asked = {"input": text, "voice": voice, "model": os.environ.get("LAVATAR_TTS_MODEL", "tts-1")}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("LAVATAR_TTS_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        body = json.dumps(asked | {"response_format": "wav"}).encode()
        request = urllib.request.Request(self._url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return normalise_level(decode_sound(answer.read(LARGEST), LONGEST))
        except (urllib.error.URLError, OSError, ValueError, ApiError):
            raise _failed() from None


def find_tts(choice: str = "auto", url: str | None = None) -> TextToSpeech | None:
    """`choice`: auto, off, flite, festival or http (which needs `url`). Raises UserError."""
    if url is not None and not url.startswith(("http://", "https://")):
        raise UserError(f"--tts-url {url}: give an address that begins with http:// or https://")
    if choice == "http" or (choice == "auto" and url):
        if url is None:
            raise UserError("--tts http: say with --tts-url where the service is")
        return HttpSpeech(url)
    programs: dict[str, tuple[str, type[Flite] | type[Festival]]] = {
        "flite": ("flite", Flite),
        "festival": ("text2wave", Festival),
    }
    if choice in programs:
        program, kind = programs[choice]
        if shutil.which(program) is None:
            raise UserError(f"--tts {choice}: the program {program} is not installed")
        return kind()
    if choice == "auto":
        return next((kind() for program, kind in programs.values() if shutil.which(program)), None)
    return None


def _run(command: list[str], text: str) -> Float[np.ndarray, " n"]:
    """Runs a program on files of its own: no shell, and no text that could be taken for an option."""
    with tempfile.TemporaryDirectory() as folder:
        written, sound = Path(folder, "text.txt"), Path(folder, "sound.wav")
        written.write_text(" ".join(text.split()) + "\n", encoding="utf-8")
        words = [word.format(text=written, sound=sound) for word in command]
        try:
            subprocess.run(words, check=True, capture_output=True, timeout=PATIENCE)
            return normalise_level(decode_sound(sound.read_bytes(), LONGEST))
        except (OSError, subprocess.SubprocessError, ApiError):
            raise _failed() from None


def _failed() -> ApiError:
    return ApiError(502, "not_available", "The text could not be spoken.")
