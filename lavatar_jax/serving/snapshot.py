"""A file as an answer, as long as it is when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PIECE = 256 << 10  # bytes


class Snapshot(StreamingResponse):
    """Sends the bytes that a file has now, though it may grow, or be replaced, while they are on their way.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: Path, *, media_type: str, filename: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed in __call__
        size = os.fstat(self._file.fileno()).st_size
        disposition = f'attachment; filename="{filename}"'
        headers = {"Content-Length": str(size), "Content-Disposition": disposition}
        super().__init__(self._pieces(size), headers=headers, media_type=media_type)

    def _pieces(self, left: int) -> Iterator[bytes]:
        while left and (piece := self._file.read(min(left, PIECE))):
            left -= len(piece)
            yield piece

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)
