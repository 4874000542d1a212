"""Who said that a face may be animated: appended to a file for good, without the picture."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from pathlib import Path

from lavatar_jax.serving.errors import ApiError

STATEMENT = "I am the person in this picture, or have that person's permission to animate it."


class ConsentLog:
    """One JSON line for each statement: time, SHA-256 of the uploaded file, session, statement, name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, *, image: bytes, session: str, name: str | None) -> None:
        """Returns when the line is on the disk. Raises ApiError: what cannot be recorded is not done."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, str | None] = {
            "time": now,
            "image_sha256": hashlib.sha256(image).hexdigest(),
            "session": session,
        }
        line |= {"statement": STATEMENT, "name": name}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, (json.dumps(line) + "\n").encode())
                os.fsync(file)
            finally:
                os.close(file)
        except OSError:
            message = "The consent could not be recorded, so the picture is not used."
            raise ApiError(503, "not_available", message, retry_after=60) from None
