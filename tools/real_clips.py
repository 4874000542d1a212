"""From a video of any kind to pieces that show one talking face: the part of `prepare_data.py` that runs in
worker processes. It needs no jax, so that workers start fast.

A video is decoded twice, in constant memory: once to look (cuts, faces, times), once to cut out what is kept.
"""

from __future__ import annotations

import dataclasses
import multiprocessing.synchronize
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
from PIL import Image

from lavatar_jax.data.clip_filters import (
    FPS,
    SHORT,
    SLOW,
    Box,
    FilterConfig,
    face_crop,
    judge_faces,
    judge_sound,
    nearest_size,
    split_shots,
)
from lavatar_jax.data.face_boxes import Detector, load_detector
from lavatar_jax.data.shots import THUMBNAIL, find_cuts, nearest_frames
from lavatar_jax.errors import UserError
from lavatar_jax.inference.inputs import open_media
from lavatar_jax.inference.sound import SAMPLE_RATE, load_sound
from lavatar_jax.inference.video import FORMATS

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".m4v", ".avi", ".ts")
UNREADABLE, CRASHED, NO_SOUND = "not a video, or damaged", "crashed the decoder", "no sound"
SOUND_ENDS = "the sound ends before the pictures"
NO_CAPTION = frozenset(("no caption", "caption is not UTF-8"))  # notes: others may come later
DEFAULT_CAPTION = "a person talking"
LOOK_SECONDS = 0.4  # between two looks for faces


@dataclasses.dataclass(frozen=True)
class Source:
    """A video file, or a member of a WebDataset tar; `name` is its path in the folder."""

    name: str
    path: Path
    member: str | None = None
    captioned: bool = False  # a .txt is beside it


@dataclasses.dataclass(frozen=True)
class Job:
    source: Source
    work: Path  # for what is cut out
    sizes: tuple[tuple[int, int], ...]  # (height, width) that the model takes
    faces: str  # name of the detector
    filters: FilterConfig


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a shot that passed all filters. Frames uint8 [T, h, w, 3] and sound float32 are files."""

    start: int  # frame of the video, at 25 a second
    frames: Path
    samples: Path
    face: float  # height of the face, pixels of the video
    level_db: float


@dataclasses.dataclass
class Outcome:
    """What became of a video. `dropped`: (where, reason); `notes`: what was odd but harmless."""

    name: str
    caption: str = DEFAULT_CAPTION
    width: int = 0
    height: int = 0
    fps: float = 0.0
    seconds: float = 0.0
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Survey:
    times: np.ndarray  # seconds [n] of the frames as they are
    thumbnails: np.ndarray  # uint8 [n, h, w]
    looks: dict[int, list[Box]]  # by frame
    size: tuple[int, int]  # height and width, upright
    start: float  # seconds, on the clock of the file


class Interrupted(Exception):  # noqa: N818 - no error
    """The run ends: stop in the middle of a video."""


_stop: multiprocessing.synchronize.Event | None = None


def start_worker(stop: multiprocessing.synchronize.Event) -> None:
    """Workers leave Ctrl-C to the main process, which sets `stop`."""
    import signal

    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def find_sources(folder: Path) -> tuple[list[Source], list[Outcome]]:
    """All videos below a folder, also those inside of tars, and what became of tars that cannot be read."""
    sources, broken = [], []
    for path in sorted(folder.rglob("*")):
        name = _readable(path.relative_to(folder).as_posix())
        if path.suffix.lower() in VIDEOS and path.is_file():
            sources.append(Source(name, path, captioned=path.with_suffix(".txt").is_file()))
        elif path.suffix.lower() == ".tar" and path.is_file():
            try:
                with tarfile.open(path) as tar:
                    names = dict.fromkeys(member.name for member in tar if member.isfile())
            except (tarfile.TarError, OSError, EOFError):
                broken.append(Outcome(name, dropped=[("whole file", "not a tar, or damaged")]))
                continue
            videos = [member for member in names if PurePosixPath(member).suffix.lower() in VIDEOS]
            sources += [
                Source(f"{name}/{_readable(member)}", path, member, captioned=_caption_name(member) in names)
                for member in videos
            ]
    return sources, broken


def _readable(name: str) -> str:
    """A file name as UTF-8 can write it: other bytes as \\x.."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def cut_video(job: Job) -> Outcome:
    """All that a worker does with a video. Raises only `Interrupted`: what is wrong is in the outcome."""
    outcome = Outcome(job.source.name)
    folder = job.work / f"{zlib.crc32(job.source.name.encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome.caption, note = read_caption(job.source)
        outcome.notes += [] if note is None else [note]
        path = _fetch(job.source, folder)
        _cut(path, job, folder, outcome)
    except Interrupted:
        raise
    except UserError as error:
        reason = NO_SOUND if "no audio track" in str(error) else UNREADABLE
        outcome.dropped.append((f"whole video ({error})", reason))
    except Exception as error:  # whatever a broken file does to a decoder must not end the run
        outcome.dropped.append((f"whole video ({type(error).__name__}: {error})", UNREADABLE))
    if not outcome.pieces:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _fetch(source: Source, folder: Path) -> Path:
    """The video as a file."""
    if source.member is None:
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


def _cut(path: Path, job: Job, folder: Path, outcome: Outcome) -> None:
    survey = _look(path, load_detector(job.faces))
    times = survey.times
    outcome.height, outcome.width = survey.size
    outcome.seconds = float(times[-1] - times[0])
    outcome.fps = (len(times) - 1) / outcome.seconds if outcome.seconds > 0 else 0.0
    if outcome.fps < job.filters.min_fps:
        outcome.dropped.append((f"whole video ({outcome.fps:.1f} a second)", SLOW))
        return
    sound = _sound_in_step(path, survey)
    shown = nearest_frames(times, FPS)
    heard = min(len(shown), -(-len(sound) * FPS // SAMPLE_RATE))
    if heard < len(shown) - FPS:
        outcome.dropped.append((_where(heard, len(shown)), SOUND_ENDS))
    shown = shown[:heard]
    pieces, short = split_shots(find_cuts(survey.thumbnails[shown]), heard, job.filters)
    outcome.dropped += [(_where(start, stop), SHORT) for start, stop in short]
    size = nearest_size(*survey.size, job.sizes)
    kept = []
    for start, stop in pieces:
        looks = [boxes for frame, boxes in survey.looks.items() if shown[start] <= frame <= shown[stop - 1]]
        samples = _part(sound, start, stop)
        reason = judge_sound(samples, job.filters) or judge_faces(looks, job.filters)
        if reason is None:
            boxes = [found[0] for found in looks if len(found) == 1]
            crop = face_crop(boxes, survey.size, size, job.filters)
            if isinstance(crop, tuple):
                kept.append((start, stop, crop, float(np.median([box.height for box in boxes])), samples))
                continue
            reason = crop
        outcome.dropped.append((_where(start, stop), reason))
    _write_pieces(path, shown, size, kept, folder, outcome)


def _where(start: int, stop: int) -> str:
    return f"{start / FPS:.1f} - {stop / FPS:.1f} s"


def _part(sound: np.ndarray, start: int, stop: int) -> np.ndarray:
    step = SAMPLE_RATE // FPS
    part = sound[start * step : stop * step]
    return np.pad(part, (0, (stop - start) * step - len(part)))


def _decode(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame), also where the file has no times. Raises UserError for what is damaged or cut off."""
    with open_media(path, "video", FORMATS) as container:
        if not container.streams.video:
            raise UserError(f"{path.name} has no pictures in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or FPS)
        count = 0
        try:
            for frame in container.decode(stream):
                if _stop is not None and _stop.is_set():
                    raise Interrupted
                yield count / rate if frame.time is None else frame.time, frame
                count += 1
        except (av.FFmpegError, ValueError) as error:
            raise UserError(f"{path.name} is damaged after {count} frames ({error})") from None
        if count < 0.95 * stream.frames or not count:  # a cut-off file may just end
            raise UserError(f"{path.name} is cut off: {count} of {stream.frames} frames are there")


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """Pixels [H, W, 3] as a player shows them: phones film sideways and say so."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round((frame.rotation or 0) / 90))


def _look(path: Path, detect: Detector) -> Survey:
    times: list[float] = []
    thumbnails: list[np.ndarray] = []
    looks: dict[int, list[Box]] = {}
    size, next_look = (0, 0), -np.inf
    for seconds, frame in _decode(path):
        if times and seconds < times[-1]:
            seconds = times[-1]
        rows, columns = THUMBNAIL
        thumbnails.append(frame.reformat(columns, rows, "gray", interpolation="AREA").to_ndarray())
        if seconds >= next_look:
            picture = _upright(frame)
            size = picture.shape[:2]
            looks[len(times)] = detect(picture)
            next_look = seconds + LOOK_SECONDS
        times.append(seconds)
    return Survey(np.array(times), np.stack(thumbnails), looks, size, float(times[0]))


def _sound_in_step(path: Path, survey: Survey) -> np.ndarray:
    """Mono sound of 16 kHz whose first sample belongs to the first frame. Raises UserError without any."""
    samples = load_sound(path).samples
    with open_media(path, "video", FORMATS) as container:
        stream = container.streams.audio[0]
        begins = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    late = round((begins - survey.start) * SAMPLE_RATE)
    return np.pad(samples, (late, 0)) if late > 0 else samples[-late:]


def _write_pieces(
    path: Path, shown: np.ndarray, size: tuple[int, int], kept: list[Any], folder: Path, outcome: Outcome
) -> None:
    """Decode again and write the cut-out frames of all pieces to files."""
    if not kept:
        return
    videos = {}
    for start, stop, _, face, samples in kept:
        piece = Piece(start, folder / f"{start}.npy", folder / f"{start}.sound.npy", face, _level(samples))
        np.save(piece.samples, samples)
        shape = (stop - start, *size, 3)
        videos[start] = np.lib.format.open_memmap(piece.frames, mode="w+", dtype=np.uint8, shape=shape)
        outcome.pieces.append(piece)
    wanted: dict[int, list[int]] = {}
    for position, number in enumerate(shown):
        wanted.setdefault(int(number), []).append(position)
    for number, (_, frame) in enumerate(_decode(path)):
        for position in wanted.get(number, ()):
            for start, stop, (top, left, height, width), _, _ in kept:
                if start <= position < stop:
                    picture = Image.fromarray(_upright(frame)[top : top + height, left : left + width])
                    scaled = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
                    videos[start][position - start] = np.asarray(scaled)
    for video in videos.values():
        video.flush()


def _level(samples: np.ndarray) -> float:
    from lavatar_jax.models.speech_level import speech_level_db

    return round(speech_level_db(samples), 1)
