"""The one error type that is a message to the user, and what the operating system says, as such."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Wrong input: the text says what is wrong, where, and what to do.

    Command lines print it as one line on stderr and exit with code 2; a server answers HTTP 4xx.
    """


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a file or folder being written into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full; free some space or write elsewhere") from None
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
