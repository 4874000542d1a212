"""Pictures and recordings that strangers send: known by their content, bounded before they are unpacked."""

from __future__ import annotations

import io
import warnings

import av
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from lavatar_jax.inference.audio_queue import clean
from lavatar_jax.inference.images import to_rgb
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.serving.errors import ApiError

IMAGE_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
SMALLEST = 32  # rows and columns of a picture
LARGEST_SIDE = 1536  # more is of no use to the model; smaller copies are kept
# What a file begins with (at an offset), and the one demuxer that may read it: playlists, which would make
# the server open other files and addresses, are not among them.
SOUNDS = (
    (0, b"RIFF", "wav"),
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (0, b"ID3", "mp3"),
    (0, b"\xff\xfb", "mp3"),
    (0, b"\xff\xf3", "mp3"),
    (0, b"\xff\xf2", "mp3"),
    (4, b"ftyp", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
)


def decode_picture(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """A PNG, JPEG or WebP picture, upright. The number of pixels is checked before any is unpacked.

    Raises ApiError 413 and 415.
    """
    message = f"The picture has more than {max_pixels / 1e6:.0f} million pixels; make it smaller."
    too_large = ApiError(413, "too_large", message)
    try:
        with warnings.catch_warnings(action="ignore"):
            image: Image.Image = Image.open(io.BytesIO(data), formats=list(IMAGE_TYPES))
            if image.width * image.height > max_pixels:
                raise too_large
            if min(image.size) < SMALLEST:
                raise ApiError(415, "unsupported_media", "The picture is too small to show a face.")
            image.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))
            image = ImageOps.exif_transpose(image)
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            return to_rgb(image)
    except ApiError:
        raise
    except Image.DecompressionBombError:
        raise too_large from None
    except Exception:  # decoders fail on damaged data in every way
        message = "That is no picture, or it is damaged; give a PNG, JPEG or WebP file."
        raise ApiError(415, "unsupported_media", message) from None


def decode_sound(data: bytes, max_seconds: float) -> Float[np.ndarray, " n"]:
    """A recording as mono float32 of 16 kHz; NaN is silence. Raises ApiError 413 and 415."""
    kind = next((name for at, magic, name in SOUNDS if data[at : at + len(magic)] == magic), None)
    unknown = ApiError(
        415, "unsupported_media", "That is no recording, or it is damaged; give WAV, MP3, FLAC, OGG or M4A."
    )
    if kind is None:
        raise unknown
    pieces, length = [], 0
    try:
        options = {"protocol_whitelist": "none"}
        with av.open(io.BytesIO(data), "r", format=kind, options=options) as container:
            if not container.streams.audio:
                raise unknown
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
            for frame in container.decode(container.streams.audio[0]):
                for part in resampler.resample(frame):
                    pieces.append(part.to_ndarray()[0])
                    length += len(pieces[-1])
                if length > max_seconds * SAMPLE_RATE:
                    raise ApiError(413, "too_large", f"The recording is longer than {max_seconds:.0f} s.")
            pieces += [part.to_ndarray()[0] for part in resampler.resample(None)]
    except (av.FFmpegError, ValueError, OSError, EOFError):
        raise unknown from None
    if not length:
        raise unknown
    return np.clip(clean(np.concatenate(pieces)), -1.0, 1.0)


def pcm16(data: bytes) -> Float[np.ndarray, " n"]:
    """PCM16 little endian as float32 in [-1, 1]. Raises ApiError for half a sample."""
    if len(data) % 2:
        raise ApiError(400, "bad_request", "PCM16 has two bytes a sample; this is an odd number of bytes.")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0


def to_pcm16(samples: Float[np.ndarray, " n"]) -> bytes:
    return (np.clip(samples, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()


class Resampler:
    """Sound of any rate to 16 kHz as it arrives, with a constant delay of about 1 ms."""

    def __init__(self, rate: int) -> None:
        if not 8000 <= rate <= 192_000:
            raise ApiError(422, "invalid", "sample_rate: give 8000 to 192000")
        self.rate = rate
        self._inner = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)

    def __call__(self, samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        if self.rate == SAMPLE_RATE or not len(samples):
            return samples
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None], np.float32), "flt", "mono")
        frame.sample_rate = self.rate
        parts = [part.to_ndarray()[0] for part in self._inner.resample(frame)]
        return np.concatenate(parts) if parts else samples[:0]
