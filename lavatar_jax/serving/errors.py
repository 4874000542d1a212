"""Every answer that is not a success has one shape, and tells nothing about the inside of the server."""

from __future__ import annotations

import logging
import math
import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavatar_jax.errors import UserError
from lavatar_jax.inference.session_host import Busy

log = logging.getLogger(__name__)

CODES = {400: "bad_request", 401: "unauthorized", 404: "not_found", 405: "bad_request", 413: "too_large"}


class ApiError(Exception):
    """An answer: HTTP status, a word for programs, a sentence for people, seconds after which to retry."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    def body(self) -> dict[str, Any]:
        return {"error": self.detail()}

    def detail(self) -> dict[str, Any]:
        detail: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.retry_after is not None:
            detail["retry_after"] = math.ceil(self.retry_after)
        return detail

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(math.ceil(self.retry_after))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def check_text(name: str, text: object, most: int) -> str:
    """What a client calls a text. Raises ApiError, also for half a character: JSON can say it
    ("\\ud83d"), but neither programs nor answers take it."""
    if not isinstance(text, str) or not 0 < len(text.strip()) <= most:
        raise ApiError(422, "invalid", f"{name}: give 1 to {most} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(422, "invalid", f"{name}: it holds half a character (of a surrogate pair)") from None
    return text


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about any exception. What nobody foresaw is logged under an id, and only the id
    is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(503, "busy", "Every place is taken; try again in a moment.", retry_after=5)
    if isinstance(error, UserError):
        return ApiError(422, "invalid", str(error))
    if isinstance(error, HTTPException):
        code = CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "internal")
        return ApiError(error.status_code, code, str(error.detail))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path"))
        return ApiError(422, "invalid", f"{where or 'the request'}: {first.get('msg', 'is not valid')}")
    name = secrets.token_hex(4)
    log.error("unexpected error %s", name, exc_info=error)
    return ApiError(500, "internal", f"Something went wrong here; the log has it under {name}.")


def add_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        return JSONResponse(told.body(), told.status, told.headers())

    for kind in (ApiError, UserError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)


class Catch:
    """Turns what no handler foresaw into an answer; how it came about is for the log only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            told = as_api_error(error)
            if not begun:
                await JSONResponse(told.body(), told.status, told.headers())(scope, receive, send)
