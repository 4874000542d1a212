"""The videos of a folder, also those inside of WebDataset tars, and their captions."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
from pathlib import Path, PurePosixPath

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".m4v", ".avi", ".ts")
NO_CAPTION = frozenset(("no caption", "caption is not UTF-8"))  # notes: others may come later
DEFAULT_CAPTION = "a person talking"


@dataclasses.dataclass(frozen=True)
class Source:
    """A video file, or a member of a WebDataset tar; `name` is its path in the folder."""

    name: str
    path: Path
    member: str | None = None
    captioned: bool = False  # a .txt is beside it
    # Size of the file and nanoseconds of its last change, when it was found.
    stamp: tuple[int, int] | None = dataclasses.field(default=None, compare=False)


def find_sources(folder: Path) -> tuple[list[Source], list[str]]:
    """All videos below a folder, also those inside of tars, and the names of tars that cannot be read."""
    sources: list[Source] = []
    broken: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = _readable(path.relative_to(folder).as_posix())
        if path.suffix.lower() in VIDEOS and path.is_file():
            captioned = path.with_suffix(".txt").is_file()
            sources.append(Source(name, path, captioned=captioned, stamp=_stamp(path)))
        elif path.suffix.lower() == ".tar" and path.is_file():
            stamp = _stamp(path)
            try:
                with tarfile.open(path) as tar:
                    names = dict.fromkeys(member.name for member in tar if member.isfile())
            except (tarfile.TarError, OSError, EOFError):
                broken.append(name)
                continue
            videos = [member for member in names if PurePosixPath(member).suffix.lower() in VIDEOS]
            for member in videos:
                captioned = _caption_name(member) in names
                sources.append(Source(f"{name}/{_readable(member)}", path, member, captioned, stamp))
    return sources, broken


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:  # it has just gone; `fetch` says so
        return None
    return about.st_size, about.st_mtime_ns


def _readable(name: str) -> str:
    """A file name as UTF-8 can write it: other bytes as \\x.."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def fetch(source: Source, folder: Path) -> Path:
    """The video as a file. Raises OSError, also where it is not there any more or must not be read."""
    if source.member is None:
        with open(source.path, "rb"):
            return source.path
    path = folder / f"video{PurePosixPath(source.member).suffix}"
    with tarfile.open(source.path) as tar, open(path, "wb") as file:
        stream = tar.extractfile(source.member)
        assert stream is not None  # a file: `find_sources`
        shutil.copyfileobj(stream, file)
    return path


def _caption_name(member: str) -> str:
    return str(PurePosixPath(member).with_suffix(".txt"))


def read_caption(source: Source) -> tuple[str, str | None]:
    """A video's caption, and of `NO_CAPTION` what is wrong with it."""
    if not source.captioned:
        return DEFAULT_CAPTION, "no caption"
    if source.member is None:
        data = source.path.with_suffix(".txt").read_bytes()
    else:
        with tarfile.open(source.path) as tar:
            stream = tar.extractfile(_caption_name(source.member))
            assert stream is not None  # a file: `find_sources`
            data = stream.read()
    try:
        return " ".join(data.decode("utf-8-sig").split()) or DEFAULT_CAPTION, None
    except UnicodeDecodeError:
        return DEFAULT_CAPTION, "caption is not UTF-8"
