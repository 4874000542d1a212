"""Who may do what: tokens, the API key, other sites' pages, and the headers that browsers obey."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavatar_jax.errors import UserError
from lavatar_jax.serving.errors import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "worker-src 'self' blob:",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
}


def new_token() -> str:
    return secrets.token_urlsafe(32)


def digest(token: str) -> bytes:
    """What is kept of a token: enough to know it again, useless to who reads it."""
    return hashlib.sha256(token.encode(errors="replace")).digest()


def same(token: str, known: bytes) -> bool:
    """Whether it is the token of this digest, in a time that does not depend on how much of it is right."""
    return hmac.compare_digest(digest(token), known)


def bearer(headers: Headers) -> str:
    """The token of an `Authorization: Bearer ...` header; empty if there is none."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def check_api_key(headers: Headers, key: str | None) -> None:
    """Raises ApiError unless the request carries the server's key, if it has one."""
    if key is not None and not same(headers.get("x-api-key", ""), digest(key)):
        raise ApiError(401, "unauthorized", "This server asks for its API key.")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, key: str | None) -> None:
    """Raises UserError when others could reach the server without a key."""
    if key is not None and len(key) < 16:
        raise UserError("the API key is too short to be a secret; give at least 16 characters")
    if key is None and not is_loopback(host):
        raise UserError(
            f"--host {host}: others could use this server; set an API key (--api-key-file or LAVATAR_API_KEY)"
        )


class SameSite:
    """Refuses requests under names that are not this server's and from pages of other sites; adds headers.

    A page of any site can make a browser send requests to this machine. The first check stops names that
    were made to point here (DNS rebinding), the second everything that says which page it comes from.
    """

    def __init__(self, app: ASGIApp, *, names: Iterable[str], any_address: bool) -> None:
        self._app, self._names, self._any_address = app, {name.lower() for name in names}, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if error := self._objection(headers):
            if scope["type"] == "websocket":
                await receive()
                return await send({"type": "websocket.close", "code": 4403, "reason": error.code})
            answer = JSONResponse(error.body(), error.status, HEADERS)
            return await answer(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                found = MutableHeaders(raw=message["headers"])
                message["headers"] = found.raw
                for name, value in HEADERS.items():
                    found.setdefault(name, value)
                if scope["path"].startswith(("/v1/sessions", "/v1/recordings", "/whip", "/whep", "/api")):
                    found.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _objection(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._is_ours(_name(f"//{host}")):
            return ApiError(403, "forbidden_origin", "This server is not known under that name.")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return ApiError(403, "forbidden_origin", "Pages of other sites may not use this server.")
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self._names:
            return True
        try:  # an address cannot be made to point elsewhere
            return self._any_address and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
