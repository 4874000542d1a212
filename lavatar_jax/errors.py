"""The one error type that is a message to the user, and what the operating system says, as such."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Wrong input: the text says what is wrong, where, and what to do.

    Command lines print it as one line on stderr and exit with code 2; a server answers HTTP 4xx.
    """


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
