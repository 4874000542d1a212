"""Sessions over HTTP: open, look at, change, make speak, record, close."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.limits import client_address
from lavatar_jax.serving.requests import read_fields, read_json, read_wish, refuse_unknown
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.services import TICKET_SECONDS, OwnRoom, SeenRoom, Services, services
from lavatar_jax.serving.sessions import BUSY, Opened
from lavatar_jax.serving.snapshot import Snapshot

router = APIRouter(tags=["sessions"])
NEW_SESSION = {
    "image": {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP; needs consent"},
    "face": {"type": "string", "description": "id of a bundled face; the first one by default"},
    "prompt": {"type": "string"},
    "consent": {"type": "boolean", "description": "you may use the picture that you upload"},
    "consent_name": {"type": "string", "description": "who says so"},
    "options": {"type": "string", "description": 'JSON: {"mode", "seed", "record", "level", "voice"}'},
}


def body(properties: dict[str, Any], *kinds: str) -> dict[str, Any]:
    """What a request may contain, for the list of endpoints."""
    schema = {"schema": {"type": "object", "properties": properties}}
    return {"requestBody": {"content": dict.fromkeys(kinds or ("application/json",), schema)}}


@router.post(
    "/v1/sessions",
    status_code=201,
    summary="Open a session: a face, a prompt, options; returns tokens and where the media are",
    openapi_extra=body(NEW_SESSION, "multipart/form-data", "application/json"),
)
async def open_session(request: Request) -> JSONResponse:
    found = services(request)
    found.check_api_key(request)
    opened = await open_room(request, found)
    room = opened.room
    return JSONResponse(told(opened, found), 201, {"Location": f"/v1/sessions/{room.identity.id}"})


async def open_room(request: Request, found: Services, fields: dict[str, Any] | None = None) -> Opened:
    """Opens a session as a request wants it (or with `fields` instead of its body). Raises ApiError."""
    try:
        found.creations.take(client_address(request.scope))
        found.sessions.check_ready()
        if found.sessions.full and not found.config.queue:
            raise BUSY  # before anything is read
        if fields is None:
            fields = await read_fields(request)
        limits = found.config.limits
        wish, upload, name = await read_wish(fields, found.faces, found.speech.tts, limits)
        async with found.sessions.place():
            session = found.sessions.new_id()
            if upload is not None:
                await asyncio.to_thread(found.consents.add, image=upload, session=session, name=name)
            return await found.sessions.open(wish, session)
    except ApiError as error:
        found.metrics.refused.labels(error.code).inc()
        raise


def told(opened: Opened, found: Services) -> dict[str, Any]:
    """What the creator of a session gets to know."""
    name = opened.room.identity.id
    here = f"/v1/sessions/{name}"
    media = {
        "call": f"{here}/call",
        "stream": f"{here}/stream",
        "whip": f"/whip/{name}",
        "whep": f"/whep/{name}",
    }
    return {
        "id": name,
        "token": opened.token,
        "viewer_token": opened.viewer_token,
        "expires_in": found.config.reconnect,
        "media": media,
        "recording": f"{here}/recording",
        "speak": f"{here}/speak",
        "session": opened.room.about(),
    }


@router.get("/v1/sessions/{id}", summary="How a session goes")
async def session(room: SeenRoom) -> dict[str, Any]:
    return room.about()


@router.patch(
    "/v1/sessions/{id}",
    summary="Change the prompt, or the mode",
    openapi_extra=body(
        {"prompt": {"type": "string"}, "mode": {"type": "string", "enum": ["echo", "silent"]}}
    ),
)
async def change(request: Request, room: OwnRoom) -> dict[str, Any]:
    fields = await read_json(request)
    refuse_unknown(fields, {"prompt", "mode"}, "a change")
    room.check_open()
    if "mode" in fields:
        room.set_mode(fields["mode"])
    if "prompt" in fields:
        room.set_prompt(fields["prompt"])
    return room.about()


@router.delete("/v1/sessions/{id}", status_code=204, summary="End a session")
async def close(room: OwnRoom) -> Response:
    await room.stop("closed")
    return Response(status_code=204)


@router.post(
    "/v1/sessions/{id}/speak",
    status_code=202,
    summary="Say a text (text to speech), or a recording",
    openapi_extra=body(
        {
            "text": {"type": "string"},
            "voice": {"type": "string"},
            "audio": {"type": "string", "format": "binary", "description": "WAV, MP3, FLAC, OGG, M4A, WebM"},
        },
        "application/json",
        "multipart/form-data",
    ),
)
async def speak(request: Request, room: OwnRoom) -> JSONResponse:
    found = services(request)
    room.check_open()
    fields = await read_fields(request)
    refuse_unknown(fields, {"text", "voice", "audio"}, "speech")
    if "audio" in fields and "text" in fields:
        raise ApiError(422, "invalid", "give a text or audio, not both")
    if "audio" not in fields:
        seconds = await found.speech.say(room, fields.get("text"), fields.get("voice"))
    elif not isinstance(fields["audio"], bytes):
        raise ApiError(422, "invalid", "audio: send a file, as multipart/form-data")
    else:
        seconds = await found.speech.play(room, fields["audio"])
    return JSONResponse({"seconds": round(seconds, 3), "queued_ms": round(1e3 * room.voice.queued)}, 202)


@router.post("/v1/sessions/{id}/interrupt", status_code=204, summary="Stop talking at once")
async def interrupt(room: OwnRoom) -> Response:
    room.check_open()
    room.interrupt()
    return Response(status_code=204)


@router.post("/v1/sessions/{id}/recording", status_code=201, summary="Begin to record")
async def record(room: OwnRoom) -> dict[str, object]:
    return room.record().about()


@router.delete("/v1/sessions/{id}/recording", summary="Stop recording; the file stays for a while")
async def stop_recording(room: OwnRoom) -> dict[str, object]:
    return (await room.stop_recording()).about()


@router.get("/v1/sessions/{id}/recording", summary="The recording so far (MP4), at any moment")
async def recording(room: OwnRoom) -> Response:
    return await recorded(room)


@router.post("/v1/sessions/{id}/recording/link", summary="A link to the recording that works once")
async def recording_link(request: Request, room: OwnRoom) -> dict[str, object]:
    check_recorded(room)
    return {"url": f"/v1/recordings/{services(request).tickets.issue(room)}", "expires_in": TICKET_SECONDS}


@router.get("/v1/recordings/{ticket}", summary="The recording of such a link")
async def linked_recording(ticket: str, request: Request) -> Response:
    return await recorded(services(request).tickets.redeem(ticket))


async def recorded(room: Room) -> Response:
    """The file as long as it is now; the whole of it, signed, where the session or the recording ends."""
    if room.reason is not None:
        await room.gone.wait()
    elif room.recording is not None and room.recording.state != "on":
        await room.completed(room.recording)
    return Snapshot(check_recorded(room), media_type="video/mp4", filename="avatar.mp4")


def check_recorded(room: Room) -> Path:
    """Where the recording is. Raises ApiError 404."""
    file = room.recording
    if file is None or file.bytes == 0:
        raise ApiError(404, "not_found", "There is no recording of this session, or nothing in it yet.")
    return file.path
