"""What everybody may see: the page, health, the faces, what can be asked."""

from __future__ import annotations

import mimetypes
from html import escape
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lavatar_jax.serving.consent import STATEMENT
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.ice import public_ice_servers
from lavatar_jax.serving.room import MODES
from lavatar_jax.serving.services import services
from lavatar_jax.serving.uploads import IMAGE_TYPES

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = (".html", ".css", ".js", ".mjs", ".svg", ".png", ".ico", ".webp", ".woff2", ".json")
mimetypes.add_type("text/javascript", ".js")
mimetypes.add_type("text/javascript", ".mjs")
mimetypes.add_type("font/woff2", ".woff2")
router = APIRouter()


@router.get("/", include_in_schema=False)
async def index() -> Response:
    if (PAGE / "index.html").is_file():
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})
    return RedirectResponse("/docs")


@router.get("/page/{path:path}", include_in_schema=False)
async def page_file(path: str) -> Response:
    # Looked up among the files that there are: no path of a client is ever opened.
    files = {file.relative_to(PAGE).as_posix(): file for file in PAGE.rglob("*") if file.suffix in PAGE_TYPES}
    if path not in files:
        raise ApiError(404, "not_found", "There is no such file.")
    return FileResponse(files[path], headers={"Cache-Control": "no-cache"})


@router.get("/healthz", tags=["server"], summary="Is the process alive")
async def healthz(request: Request) -> dict[str, str]:
    sessions = services(request).sessions
    if sessions.failed or (sessions.ready and not sessions.stopping):
        sessions.check_ready()  # a process whose model has failed is better started again
    return {"status": "ok"}


@router.get("/readyz", tags=["server"], summary="Can sessions be opened; 503 while compiling and stopping")
async def readyz(request: Request) -> dict[str, object]:
    sessions = services(request).sessions
    sessions.check_ready()
    return {"ready": True, "sessions": len(sessions.open_rooms), "places": sessions.places}


@router.get("/metrics", tags=["server"], summary="For Prometheus; needs the API key if there is one")
async def metrics(request: Request) -> Response:
    found = services(request)
    found.check_api_key(request)
    return Response(found.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/config", tags=["server"], summary="What this server can do, and its limits")
async def config(request: Request) -> dict[str, object]:
    found = services(request)
    sessions, limits = found.sessions, found.config.limits
    height, width = sessions.size
    names = ("image_bytes", "image_pixels", "sound_bytes", "sound_seconds", "text_chars", "prompt_chars")
    return {
        "model": sessions.host.avatar.config.name,
        "api_key_required": found.config.api_key is not None,
        "places": sessions.places,
        "sessions": len(sessions.open_rooms),
        "video": {"width": width, "height": height, "fps": sessions.fps},
        "tts": found.speech.about(),
        "limits": {name: getattr(limits, name) for name in (*names, "recording_seconds")}
        | {"image_types": list(IMAGE_TYPES.values())},
        "consent_statement": STATEMENT,
        "modes": list(MODES),
        "reconnect_seconds": found.config.reconnect,
        "idle_seconds": found.config.idle,
        "provenance": {
            "watermark": found.config.watermark,
            "c2pa": found.config.c2pa_certificate is not None,
        },
        "ice_servers": public_ice_servers(found.config.ice_servers),
    }


@router.get("/v1/faces", tags=["faces"], summary="The faces to choose from")
async def faces(request: Request) -> dict[str, object]:
    return {"faces": [face.about() for face in services(request).faces.values()]}


@router.get("/v1/faces/{face}/{kind}", tags=["faces"], summary="A face's picture: `thumbnail` or `image`")
async def face_picture(face: str, kind: str, request: Request) -> Response:
    found = services(request).faces.get(face)
    pictures = {} if found is None else {"thumbnail": found.thumbnail, "image": found.png}
    if kind not in pictures:
        raise ApiError(404, "not_found", "There is no such picture.")
    return Response(pictures[kind], media_type="image/png", headers={"Cache-Control": "max-age=3600"})


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """All endpoints, as a plain page: nothing of it comes from elsewhere."""
    rows = []
    for path, operations in request.app.openapi()["paths"].items():
        for method, about in operations.items():
            description = escape(about.get("description", ""))
            rows.append(
                f"<dt><code>{method.upper()} {escape(path)}</code></dt>"
                f"<dd>{escape(about.get('summary', ''))}<p>{description}</p></dd>"
            )
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<meta name=color-scheme content='light dark'><title>Endpoints</title><h1>Endpoints</h1>"
        "<p>The same for programs: <a href=/openapi.json>openapi.json</a>. Errors are "
        "<code>{&quot;error&quot;: {&quot;code&quot;, &quot;message&quot;}}</code>. Tokens go in "
        "<code>Authorization: Bearer ...</code>.</p><dl>" + "".join(rows) + "</dl></html>"
    )
