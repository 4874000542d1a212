"""How much and how often: sizes of bodies while they arrive, and rates of requests."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lavatar_jax.serving.errors import ApiError


class BodyLimit:
    """Stops reading a body that is too large, or does not come, whatever its headers said.

    `largest(path)`: bytes.
    """

    def __init__(self, app: ASGIApp, *, largest: Callable[[str], int], patience: float) -> None:
        self._app, self._largest, self._patience = app, largest, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit, received = self._largest(scope["path"]), 0
        too_large = ApiError(413, "too_large", f"That is more than {limit / 2**20:.2g} MiB.")
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            answer = JSONResponse(too_large.body(), 413, {"Connection": "close"})
            return await answer(scope, receive, send)
        complete = announced == "0" and "transfer-encoding" not in headers

        async def counted() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._patience)
            except TimeoutError:
                raise ApiError(408, "bad_request", "The rest of the request did not come.") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise too_large
            return message

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and not complete:
                # An answer to a part: otherwise the rest would still be read, to be thrown away.
                MutableHeaders(raw=message.setdefault("headers", [])).append("Connection", "close")
            await send(message)

        await self._app(scope, counted, send_last)


class Rate:
    """A bucket for each key that fills with `per_second` and holds `burst`; the oldest keys are forgotten."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> None:
        """Raises ApiError when the bucket is empty."""
        now = self._clock()
        level, since = self._buckets.pop(key, (float(self._burst), now))
        level = min(float(self._burst), level + (now - since) * self._per_second)
        self._buckets[key] = (max(0.0, level - 1.0) if level >= 1.0 else level, now)
        if len(self._buckets) > 10_000:
            self._buckets.popitem(last=False)
        if level < 1.0:
            wait = (1.0 - level) / self._per_second
            raise ApiError(429, "rate_limited", "Too many requests; slow down.", retry_after=wait)


class RateLimit:
    """At most so many requests of one address."""

    def __init__(self, app: ASGIApp, *, rate: Rate) -> None:
        self._app, self._rate = app, rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope["path"] not in ("/healthz", "/readyz"):
            try:
                self._rate.take(client_address(scope))
            except ApiError as error:
                if scope["type"] == "websocket":
                    await receive()
                    return await send({"type": "websocket.close", "code": 4429, "reason": error.code})
                answer = JSONResponse(error.body(), error.status, error.headers())
                return await answer(scope, receive, send)
        await self._app(scope, receive, send)


def client_address(scope: Scope) -> str:
    return (scope.get("client") or ("unknown", 0))[0]
