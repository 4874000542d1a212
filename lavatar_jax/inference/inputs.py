"""Opening files that users give: what is wrong with one is said in one line, and only files are opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import av

from lavatar_jax.errors import UserError

# Demuxers of files with sound or video; playlists, which name other files to read, are not among them.
DEMUXERS = "wav,w64,aiff,au,caf,mp3,flac,ogg,mov,aac,matroska,mpegts,avi,amr,ac3,asf"


def check_input(path: str | Path, kind: str, formats: str) -> Path:
    """`kind` and `formats` are for the message: "audio", "WAV, MP3 or OGG". Raises UserError."""
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such {kind} file") from None
    except PermissionError:
        raise UserError(f"{path}: not allowed to look into its folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no such {kind} file ({getattr(error, 'strerror', error)})") from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is a folder; give one {kind} file ({formats})")
    if found.st_size == 0:
        raise UserError(f"{path} is an empty file; give one {kind} file ({formats})")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: not allowed to read this file")
    return path


def open_media(path: str | Path, kind: str, formats: str) -> av.container.InputContainer:
    """Opens a file with sound or video. Raises UserError."""
    path = check_input(path, kind, formats)
    try:
        return av.open(str(path), options={"format_whitelist": DEMUXERS, "protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, ValueError):
        raise UserError(f"{path} is no {kind} file, or is damaged; give a {formats} file") from None
