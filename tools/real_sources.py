"""The videos of a folder, also those inside of WebDataset tars, with their captions and driving poses."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
from pathlib import Path, PurePosixPath

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".m4v", ".avi", ".ts")
BROKEN_TAR, LONE_POSE = "not a tar, or damaged", "a pose without its video"
NO_CAPTION = frozenset(("no caption", "caption is not UTF-8"))  # notes: others may come later
DEFAULT_CAPTION = "a person talking"
POSE = ".pose"  # ends the stem of a driving pose


@dataclasses.dataclass(frozen=True)
class Source:
    """A video file, or a member of a WebDataset tar; `name` is its path in the folder."""

    name: str
    path: Path
    member: str | None = None
    captioned: bool = False  # a .txt is beside it
    # Size of the file and nanoseconds of its last change, when it was found.
    stamp: tuple[int, int] | None = dataclasses.field(default=None, compare=False)
    pose: Source | None = None  # the video NAME.pose.* beside it


def find_sources(folder: Path) -> tuple[list[Source], dict[str, str]]:
    """All videos below a folder, also those inside of tars; and why other files are of no use, by name: tars
    that cannot be read, poses without a video."""
    sources: list[Source] = []
    useless: dict[str, str] = {}
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
                useless[name] = BROKEN_TAR
                continue
            members = [member for member in names if PurePosixPath(member).suffix.lower() in VIDEOS]
            for member in members:
                captioned = _caption_name(member) in names
                sources.append(Source(f"{name}/{_readable(member)}", path, member, captioned, stamp))
    videos, alone = _with_poses(sources)
    return videos, useless | dict.fromkeys(alone, LONE_POSE)


def _with_poses(found: list[Source]) -> tuple[list[Source], list[str]]:
    """The videos among the files, each with its pose, and the names of poses without a video."""
    videos: list[tuple[str, Source]] = []
    poses: dict[str, Source] = {}
    for source in found:
        stem = source.name.rpartition(".")[0]
        if stem.lower().endswith(POSE):
            poses[stem[: -len(POSE)]] = source
        else:
            videos.append((stem, source))
    alone = poses.keys() - {stem for stem, _ in videos}
    paired = [dataclasses.replace(source, pose=poses.get(stem)) for stem, source in videos]
    return paired, sorted(poses[stem].name for stem in alone)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:  # it has just gone; `fetch` says so
        return None
    return about.st_size, about.st_mtime_ns


def _readable(name: str) -> str:
    """A file name as UTF-8 can write it: other bytes as \\x.."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def fetch(source: Source, folder: Path, name: str = "video") -> Path:
    """The video as a file: one of a tar as `name` in `folder`.

    Raises OSError, also where it is not there any more or must not be read.
    """
    if source.member is None:
        with open(source.path, "rb"):
            return source.path
    path = folder / f"{name}{PurePosixPath(source.member).suffix}"
    with open(path, "wb") as file:
        stream = _open_tar(source.path).extractfile(source.member)
        assert stream is not None  # a file: `find_sources`
        shutil.copyfileobj(stream, file)
    return path


_opened: tuple[Path, tuple[int, int] | None, tarfile.TarFile] | None = None


def _open_tar(path: Path) -> tarfile.TarFile:
    """The tar that was read last stays open: to find a member, a new one would read all headers again."""
    global _opened
    stamp = _stamp(path)
    if _opened is not None and _opened[:2] == (path, stamp):
        return _opened[2]
    if _opened is not None:
        _opened[2].close()
        _opened = None
    _opened = path, stamp, tarfile.open(path)  # noqa: SIM115 - see above
    return _opened[2]


def _caption_name(member: str) -> str:
    return str(PurePosixPath(member).with_suffix(".txt"))


def read_caption(source: Source) -> tuple[str, str | None]:
    """A video's caption, and of `NO_CAPTION` what is wrong with it."""
    if not source.captioned:
        return DEFAULT_CAPTION, "no caption"
    if source.member is None:
        data = source.path.with_suffix(".txt").read_bytes()
    else:
        stream = _open_tar(source.path).extractfile(_caption_name(source.member))
        assert stream is not None  # a file: `find_sources`
        data = stream.read()
    try:
        return " ".join(data.decode("utf-8-sig").split()) or DEFAULT_CAPTION, None
    except UnicodeDecodeError:
        return DEFAULT_CAPTION, "caption is not UTF-8"
