"""What was left out, and why: a log that several processes append to."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

SKIPPED = "skipped_records.jsonl"  # in the folder of a run

logger = logging.getLogger(__name__)


class SkippedLog:
    """Names of unreadable records with the reason; each is told once, however often it is met.

    With a `path` the lines {"id", "reason"} go there too, and come from there: whatever process wrote them.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._told: dict[str, str] = {}

    def add(self, identifier: str, reason: str) -> None:
        if identifier in self._told:
            return
        self._told[identifier] = reason
        logger.warning("training record %s skipped: %s", identifier, reason)
        if self.path is None:
            return
        line = json.dumps({"id": identifier, "reason": reason}) + "\n"
        with contextlib.suppress(OSError):  # a log that cannot be written must not end a training run
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line.encode())  # one write: lines of several processes do not mix
            finally:
                os.close(descriptor)

    def read(self) -> dict[str, str]:
        """Reasons by record."""
        found = dict(self._told)
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    entry = json.loads(line)
                    found.setdefault(entry["id"], entry["reason"])
        return found
