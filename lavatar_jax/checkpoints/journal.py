"""What a conversion has finished, on disk, so that one that was killed goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavatar_jax.errors import UserError


class Journal:
    """A file of JSON lines: first the task, then one line for each finished piece.

    `done` maps a piece's name to its last line. A line that was cut off by a kill is forgotten.
    Raises UserError when the journal is of another task (options or sources have changed since), or another
    process is writing it.
    """

    def __init__(self, path: Path, task: Mapping[str, Any]) -> None:
        self.done: dict[str, Any] = {}
        self._file = path.open("ab")
        try:
            fcntl.flock(
                self._file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel releases it, even after a kill
            self._read(path, task)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{path.parent} is being written by another process; wait for it") from None
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path, task: Mapping[str, Any]) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if lines:
            self._check(path, json.loads(lines[0]), json.loads(json.dumps(task)))
        for line in lines[1:]:
            self.done.update(json.loads(line))
        self._file.truncate(sum(map(len, lines)))
        if not lines:
            self._append(task)

    def record(self, name: str, value: Any, *, sync: bool = True) -> None:
        """The piece is finished; `sync`: returns when that is on disk."""
        self._append({name: value}, sync)
        self.done[name] = value

    def close(self) -> None:
        self._file.close()

    def _append(self, value: Mapping[str, Any], sync: bool = True) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    @staticmethod
    def _check(path: Path, found: Mapping[str, Any], task: Mapping[str, Any]) -> None:
        changed = sorted(key for key in {*found, *task} if found.get(key) != task.get(key))
        if changed:
            raise UserError(
                f"{path.parent} was begun with another {' and '.join(changed)}: give the same options and "
                "files to go on with it, or remove it to begin again"
            )
