"""Reading what clients send, field by field; what is not understood is told, nothing is guessed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from lavatar_jax.serving.config import Limits
from lavatar_jax.serving.errors import ApiError, check_text
from lavatar_jax.serving.faces import Face
from lavatar_jax.serving.room import MODES
from lavatar_jax.serving.sessions import Wish
from lavatar_jax.serving.speech import check_voice
from lavatar_jax.serving.tts import TextToSpeech
from lavatar_jax.serving.uploads import decode_picture

FIELDS = {"image", "face", "prompt", "consent", "consent_name", "options"}
OPTIONS = {"mode", "seed", "record", "level", "voice"}


async def read_json(request: Request) -> dict[str, Any]:
    """A JSON object. Raises ApiError."""
    try:
        found = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, "bad_request", "The body is a JSON object.")
    return found


async def read_fields(request: Request) -> dict[str, Any]:
    """A form's fields, or a JSON object's; files become bytes. Raises ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await read_json(request)
    async with request.form(max_files=1, max_fields=10) as form:
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name in fields:
                raise ApiError(422, "invalid", "every field can be given once")
            fields[name] = await value.read() if isinstance(value, UploadFile) else value
        return fields


def refuse_unknown(given: Mapping[str, Any], known: set[str], what: str) -> None:
    for name in sorted(map(str, set(given) - known)):
        shown = re.sub(r"[^\w.-]", "?", name[:40])
        raise ApiError(422, "invalid", f"{what} has no {shown}; it has {', '.join(sorted(known))}")


async def read_wish(
    fields: Mapping[str, Any], faces: Mapping[str, Face], tts: TextToSpeech | None, limits: Limits
) -> tuple[Wish, bytes | None, str | None]:
    """What a new session is to be; the uploaded file, if any; who consents. Raises ApiError."""
    refuse_unknown(fields, FIELDS, "a session")
    options = _options(fields.get("options"), tts)
    prompt = check_text("prompt", fields.get("prompt", "a person talking"), limits.prompt_chars)
    name = fields.get("consent_name")
    if name is not None and not (isinstance(name, str) and len(name) <= 100):
        raise ApiError(422, "invalid", "consent_name: at most 100 characters")
    upload = fields.get("image")
    if upload is None or upload == b"":
        face = fields.get("face", next(iter(faces)))
        if not isinstance(face, str) or face not in faces:
            raise ApiError(422, "invalid", "face: one of GET /v1/faces")
        return Wish(image=faces[face].pixels, face=face, prompt=prompt, **options), None, None
    if not isinstance(upload, bytes):
        raise ApiError(422, "invalid", "image: send a file, as multipart/form-data")
    if "face" in fields:
        raise ApiError(422, "invalid", "give an image or a face, not both")
    if fields.get("consent") not in (True, "true"):
        message = "A picture that you upload needs your statement that you may use it: consent=true."
        raise ApiError(403, "consent_required", message)
    if len(upload) > limits.image_bytes:
        raise ApiError(413, "too_large", f"The picture is larger than {limits.image_bytes >> 20} MiB.")
    pixels = await asyncio.to_thread(decode_picture, upload, limits.image_pixels)
    return Wish(image=pixels, face=None, prompt=prompt, **options), upload, name


def _options(given: Any, tts: TextToSpeech | None) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except (ValueError, RecursionError):
            raise ApiError(422, "invalid", "options: this is not JSON") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ApiError(422, "invalid", "options: a JSON object")
    refuse_unknown(given, OPTIONS, "options")
    checks = {
        "mode": lambda v: v in MODES if isinstance(v, str) else False,
        "seed": lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**32,
        "record": lambda v: isinstance(v, bool),
        "level": lambda v: isinstance(v, bool),
        "voice": lambda v: v is None or bool(check_voice(tts, v)),
    }
    for name, value in given.items():
        if not checks[name](value):
            raise ApiError(422, "invalid", f"options.{name}: this value is not possible")
    return given
