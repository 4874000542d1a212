"""Media: WebRTC calls under the names that clients know, and the WebSocket."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, WebSocket
from fastapi.responses import JSONResponse, Response

from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.ice import ice_servers
from lavatar_jax.serving.media_webrtc import Call
from lavatar_jax.serving.media_ws import serve_socket
from lavatar_jax.serving.requests import read_json, refuse_unknown
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.routes_sessions import body, open_room
from lavatar_jax.serving.security import bearer
from lavatar_jax.serving.services import OwnRoom, SeenRoom, Services, services, services_of
from lavatar_jax.serving.verbs import Verbs

router = APIRouter(tags=["media"])
SDP = "application/sdp"
OFFER = {"requestBody": {"content": {SDP: {"schema": {"type": "string"}}}}}


async def connect(found: Services, room: Room, sdp: str, *, controls: bool) -> tuple[Call, str]:
    """Answers an offer. Raises ApiError."""
    if found.sessions.stopping:
        found.sessions.check_ready()
    room.check_room_for_more()
    verbs = Verbs(room, found.speech, controls=controls)
    call = Call(
        room,
        verbs,
        controls=controls,
        ice_servers=ice_servers(found.config.ice_servers),
        dropped=found.metrics.dropped_frames,
    )
    return call, await call.answer(sdp)


async def answer(request: Request, room: Room, *, controls: bool) -> Response:
    if not request.headers.get("content-type", "").startswith(SDP):
        raise ApiError(415, "unsupported_media", f"Send the offer as {SDP}.")
    try:
        sdp = (await request.body()).decode()
    except UnicodeDecodeError:
        raise ApiError(400, "bad_request", "That is no offer in SDP.") from None
    call, answered = await connect(services(request), room, sdp, controls=controls)
    where = f"/v1/sessions/{room.identity.id}/calls/{call.id}"
    return Response(answered, 201, {"Location": where}, media_type=SDP)


@router.get("/v1/sessions/{id}/ice", summary="STUN and TURN servers for a call, as browsers take them")
async def ice(request: Request, room: SeenRoom) -> dict[str, object]:
    return {"ice_servers": ice_servers(services(request).config.ice_servers)}


@router.post("/v1/sessions/{id}/call", status_code=201, summary="Offer in, answer out", openapi_extra=OFFER)
async def call(request: Request, room: OwnRoom) -> Response:
    return await answer(request, room, controls=True)


@router.post("/whip/{id}", status_code=201, summary="WHIP: a microphone", openapi_extra=OFFER)
async def whip(request: Request, room: OwnRoom) -> Response:
    return await answer(request, room, controls=True)


@router.post("/whep/{id}", status_code=201, summary="WHEP: a viewer", openapi_extra=OFFER)
async def whep(request: Request, room: SeenRoom) -> Response:
    return await answer(request, room, controls=False)


@router.delete("/v1/sessions/{id}/calls/{call}", status_code=204, summary="Hang up")
async def hang_up(call: str, request: Request, room: SeenRoom) -> Response:
    found = room.calls.get(call)
    if found is None:
        raise ApiError(404, "not_found", "There is no such call.")
    if found.controls and not room.may_control(bearer(request.headers)):
        raise ApiError(403, "viewer_only", "This token can only watch.")
    await found.hang_up("hung up")
    return Response(status_code=204)


@router.post(
    "/api/offer",
    summary="An offer in JSON; opens a session with the first face where none is named",
    openapi_extra=body({name: {"type": "string"} for name in ("sdp", "type", "session_id", "pc_id")}),
)
async def json_offer(request: Request) -> JSONResponse:
    found = services(request)
    fields = await read_json(request)
    refuse_unknown(fields, {"sdp", "type", "session_id", "pc_id", "restart_pc", "request_data"}, "an offer")
    sdp, name = fields.get("sdp"), fields.get("session_id")
    if not isinstance(sdp, str) or fields.get("type", "offer") != "offer":
        raise ApiError(422, "invalid", "sdp: the text of an offer")
    if name is not None:
        if not isinstance(name, str) or not re.fullmatch(r"s_[0-9a-f]{16}", name):
            raise ApiError(422, "invalid", "session_id: as POST /v1/sessions returned it")
        room = found.sessions.controlled(name, bearer(request.headers))
        call, answered = await connect(found, room, sdp, controls=True)
        return JSONResponse({"sdp": answered, "type": "answer", "pc_id": call.id, "session_id": name})
    found.check_api_key(request)
    opened = await open_room(request, found, fields={})
    try:
        call, answered = await connect(found, opened.room, sdp, controls=True)
    except ApiError:
        await opened.room.stop("closed")
        raise
    call.owns_room = True
    about = {"pc_id": call.id, "session_id": opened.room.identity.id, "token": opened.token}
    return JSONResponse({"sdp": answered, "type": "answer", **about})


@router.websocket("/v1/sessions/{id}/stream")
async def stream(socket: WebSocket, id: str) -> None:
    found = services_of(socket)
    await serve_socket(socket, id, found.sessions, found.speech)
