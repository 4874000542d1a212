"""One JSON object a line, with the session it is about. Never tokens, sound or pictures."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

session_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("session_id", default=None)
log = logging.getLogger("lavatar_jax.serving.access")
PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": stamp, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        line |= {name: value for name, value in record.__dict__.items() if name not in PLAIN}
        if (session := session_id.get()) and "session" not in line:
            line["session"] = session
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json(level: int = logging.INFO) -> None:
    """For a whole process: everything that is logged becomes a JSON line on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("aioice", "aiortc", "jax", "asyncio", "libav"):
        logging.getLogger(name).setLevel(logging.WARNING)


class AccessLog:
    """A line for each request: which route (not its query), how it went, how long it took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ("/healthz", "/readyz", "/metrics"):
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            session = scope.get("path_params", {}).get("id")
            route = getattr(scope.get("route"), "path", "(none)")
            milliseconds = round(1e3 * (time.perf_counter() - start), 1)
            about = {"method": scope["method"], "route": route, "status": status, "ms": milliseconds}
            log.info("request", extra=about | ({"session": session} if session else {}))
