"""One training record as bytes: msgpack of named arrays and strings.

Fields of a record (no batch axis; F latent frames, T = 4F video frames of 25 a second; h, w rows and columns
of a latent; S tokens of a prompt):

    id         str: names the record in manifests, logs and errors
    caption    str: the prompt
    latent     [F, h, w, Z] float16: raw means of the VAE; the video frame before the clip is their context
    reference  [1, h, w, Z] float16: a picture of the same person from elsewhere, likewise
    audio      [L, A, T] float16: features of L layers; frame j drives video frame j + 1

and, where known:

    text       [S, E] float16: states of the caption without padding (else they are made of its words)
    mouth      [h, w] uint8: 0 .. 255, where the loss looks closer
    openness   [T] float16: how far the mouth is open, 0 .. 1
    motion     [Fm, h, w, Z] float16: latents of the frames before the clip
    pose       [F, h, w, Z] float16: raw means of the driving pose, in step with `latent`; its context is a
               copy of its first frame, anew for each clip of the sampler (`inference/pose.py`)
    spread     [Z] float16: the encoder's own deviation
    pixels     [1 + 4k, H, W, 3] uint8: the first frames of the clip, for stage 0
    face       [4] float32: top, left, bottom and right of the face in them, in shares of height and width
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import msgpack
import numpy as np

Record = dict[str, np.ndarray | str]

REQUIRED = ("id", "caption", "latent", "reference", "audio")


def encode_record(record: Mapping[str, np.ndarray | str]) -> bytes:
    """Raises ValueError where a required field is missing or an array has numbers that are not finite.

    Half precision ends at 65504: what is beyond it would come back as infinity.
    """
    if missing := [name for name in REQUIRED if name not in record]:
        raise ValueError(f"a record needs {', '.join(missing)}")
    packed: dict[str, object] = {}
    for name, value in record.items():
        if isinstance(value, str):
            packed[name] = value
            continue
        array = np.ascontiguousarray(value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} of record {record['id']} is not finite")
        packed[name] = [array.dtype.str, list(array.shape), array.tobytes()]
    return msgpack.packb(packed)


def decode_record(data: bytes) -> Record:
    """Arrays are read-only views of `data`. Raises ValueError where the bytes are no record."""
    try:
        record = {
            name: value if isinstance(value, str) else _array(*value)
            for name, value in msgpack.unpackb(data).items()
        }
    except (TypeError, AttributeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"not a training record: {error}") from None
    if missing := [name for name in REQUIRED if name not in record]:
        raise ValueError(f"not a training record: no {', '.join(missing)}")
    return record


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape)


def file_name(identifier: str) -> str:
    """A record's id as a file's name: of real videos it holds a path, and may be longer than names are."""
    short = identifier.replace("/", "_")[-50:]
    return short if short == identifier else f"{short}-{zlib.crc32(identifier.encode()):08x}"


def shapes(record: Mapping[str, np.ndarray | str]) -> dict[str, list[int]]:
    """The shape of every array, for the manifest: records of equal shapes may share a batch."""
    return {name: list(value.shape) for name, value in record.items() if isinstance(value, np.ndarray)}
