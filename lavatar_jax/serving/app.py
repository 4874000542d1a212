"""The web application: what every request passes through, and what runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fastapi import FastAPI

import lavatar_jax
from lavatar_jax.inference.session_host import SessionHost
from lavatar_jax.serving import routes_info, routes_media, routes_sessions
from lavatar_jax.serving.config import Limits, ServerConfig
from lavatar_jax.serving.consent import ConsentLog
from lavatar_jax.serving.credentials import Credentials
from lavatar_jax.serving.errors import Catch, add_error_handlers
from lavatar_jax.serving.faces import Face, load_faces
from lavatar_jax.serving.limits import BodyLimit, Rate, RateLimit
from lavatar_jax.serving.logs import AccessLog
from lavatar_jax.serving.metrics import Metrics
from lavatar_jax.serving.security import LOOPBACK, SameSite, is_loopback
from lavatar_jax.serving.services import Services
from lavatar_jax.serving.sessions import Sessions
from lavatar_jax.serving.speech import Speech
from lavatar_jax.serving.tts import TextToSpeech, find_tts

FORM_BYTES = 64 << 10  # what is around an upload


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """What a server needs besides a model."""

    faces: dict[str, Face]
    tts: TextToSpeech | None
    sign: Callable[[Path], None] | None  # finished recordings


def find_extras(config: ServerConfig) -> Extras:
    """Takes a moment, unlike a model: what is wrong here is told before one is loaded. Raises UserError."""
    sign = None
    if config.c2pa_certificate is not None and config.c2pa_key is not None:
        sign = Credentials(config.c2pa_certificate, config.c2pa_key).sign
    return Extras(faces=load_faces(config.faces), tts=find_tts(config.tts, config.tts_url), sign=sign)


def create_app(host: SessionHost, config: ServerConfig, extras: Extras | None = None) -> FastAPI:
    """A server of a host that is not started yet. `extras`: if they were found already. Raises UserError."""
    metrics, limits = Metrics(), config.limits
    extras = extras or find_extras(config)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        sessions = Sessions(host, config, metrics, extras.sign)
        speech = Speech(extras.tts, limits, level=sessions.listens_to_loudness)
        app.state.services = Services(
            config=config,
            sessions=sessions,
            metrics=metrics,
            faces=extras.faces,
            speech=speech,
            consents=ConsentLog(config.data / "consent.jsonl"),
            creations=Rate(limits.creations_per_minute / 60, limits.creations_burst),
        )
        starting = asyncio.create_task(sessions.start())
        watching = asyncio.create_task(sessions.watch())
        yield
        watching.cancel()
        await starting
        await sessions.stop()
        speech.close()

    app = FastAPI(
        title="lavatar_jax live",
        version=lavatar_jax.__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    add_error_handlers(app)
    for routes in (routes_info, routes_sessions, routes_media):
        app.include_router(routes.router)
    # The last one added sees a request first.
    app.add_middleware(Catch)
    app.add_middleware(BodyLimit, largest=_largest(limits), patience=limits.body_seconds)
    app.add_middleware(RateLimit, rate=Rate(limits.requests_per_second, limits.requests_burst))
    own = {config.host, *config.hosts} | (set(LOOPBACK) if is_loopback(config.host) else set())
    app.add_middleware(SameSite, names=own, any_address=not is_loopback(config.host))
    app.add_middleware(AccessLog)
    return app


def _largest(limits: Limits) -> Callable[[str], int]:
    def largest(path: str) -> int:
        if path == "/v1/sessions":
            return limits.image_bytes + FORM_BYTES
        if path.endswith("/speak"):
            return limits.sound_bytes + FORM_BYTES
        return limits.body_bytes

    return largest
