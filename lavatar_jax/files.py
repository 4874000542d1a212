"""Files that are there whole or not at all, and what goes wrong with them told in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lavatar_jax.errors import UserError


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a file or folder being written into a UserError, also where
    a library hands it on as an error of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _told_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full; free some space or write elsewhere") from None
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number is not None else error
        raise UserError(f"{path}: cannot be written ({reason})") from None


def _told_number(error: Exception) -> int | None:
    """The errno in the message of safetensors ("os error 28") and tensorstore ("os_error_code='28'")."""
    found = re.search(r"os[ _]error(?: |_code=')(\d+)", str(error), re.IGNORECASE)
    return int(found[1]) if found else None


def temporary_name(path: Path) -> Path:
    """A hidden name in the same folder, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to: it becomes `path` when the block ends, and is removed when it fails.

    What is no file, as /dev/stdout, is written to itself. Raises UserError for what the system says.
    """
    part = temporary_name(path)
    with write_errors(path):
        if path.exists() and not path.is_file():
            yield path
            return
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, atomically. Raises UserError."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def link_file(file: Path, place: Path) -> None:
    """The same file under another name too; a copy on another file system. Raises OSError."""
    place.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)


def check_new(path: Path) -> None:
    """Raises UserError where something stands at `path` already, which is not to be replaced."""
    with write_errors(path):
        exists = os.path.lexists(path)
    if exists:
        raise UserError(f"{path} exists already; give another --out, or remove it")


def lock_folder(folder: Path) -> IO[str]:
    """Makes the folder, and a file in it: no other process gets the folder until this one closes the file.

    Where the file system knows no locks, others get it nevertheless. Raises UserError where one has it, or it
    cannot be made.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - held by who asked for it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"another process is writing to {folder}; wait for it to end, or choose another place"
        ) from None
    except OSError:
        pass
    return lock
