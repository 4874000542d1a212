"""From a video of any kind to pieces that show one talking face: the part of `prepare_data.py` that runs in
worker processes. It needs no jax, so that workers start fast.

A video is decoded twice, in constant memory: once to look (cuts, faces, times), once to cut out what is kept.
Only what reading it says condemns a video (`Damaged`). A full disk or a detector that fails ends the run: the
next one looks at the video again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.synchronize
import shutil
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from lavatar_jax.data.clip_filters import (
    FPS,
    SLOW,
    Box,
    FilterConfig,
    face_crop,
    face_in_crop,
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
from tools.real_sources import DEFAULT_CAPTION, Source, fetch, read_caption

UNREADABLE, CRASHED, NO_SOUND = "not a video, or damaged", "crashed the decoder", "no sound"
SOUND_ENDS = "the sound ends before the pictures"
# Notes: such poses are left out, their videos are not.
POSE_UNREADABLE, POSE_SHAPE = "pose is not a video, or damaged", "pose has other proportions than the video"
POSE_LENGTH = "pose is shorter or longer than the video"
POSE_STRETCH = 0.02  # of proportions, by sides that are rounded to even numbers
POSE_SLACK = 5  # frames that a pose may be shorter or longer; its last one is held, as when a video is made
LOOK_SECONDS = 0.4  # between two looks for faces


@dataclasses.dataclass(frozen=True)
class Job:
    source: Source
    work: Path  # for what is cut out
    sizes: tuple[tuple[int, int], ...]  # (height, width) that the model takes
    faces: str  # name of the detector
    filters: FilterConfig
    shortest: int = 1  # frames of a piece that gives a record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a shot that passed all filters. Frames and poses uint8 [T, h, w, 3] and sound float32 are
    files."""

    start: int  # frame of the video, at 25 a second
    frames: Path
    samples: Path
    face: float  # height of the face, pixels of the video
    place: tuple[
        float, ...
    ]  # where it mostly is in the frames: top, left, bottom and right, in shares of them
    level_db: float
    n_faces: int | None = None  # the most that a look saw; None where nothing counts them
    pose: Path | None = None  # cut out like the frames


Cut = tuple[int, int, tuple[int, int, int, int]]  # first frame and end of a piece, what is cut out


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


class Damaged(Exception):  # noqa: N818 - like Interrupted
    """The video cannot be read, and never will be."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Around what opens and decodes a video: its errors are the video's, but for those of the system."""
    try:
        yield
    except (Interrupted, Damaged):
        raise
    except Exception as error:  # whatever a broken file does to a decoder must not end the run
        if isinstance(error, OSError | MemoryError) and not isinstance(error, av.FFmpegError):
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise Damaged(f"{kind}{error}") from error


_stop: multiprocessing.synchronize.Event | None = None


def start_worker(stop: multiprocessing.synchronize.Event) -> None:
    """Workers leave Ctrl-C to the main process, which sets `stop`."""
    import signal

    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def cut_video(job: Job) -> Outcome:
    """All that a worker does with a video: what is wrong with it is in the outcome.

    Raises `Interrupted`, and UserError for what went wrong and is no fault of the video.
    """
    outcome = Outcome(job.source.name)
    folder = job.work / f"{zlib.crc32(job.source.name.encode()):08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _reading():
            outcome.caption, note = read_caption(job.source)
            outcome.notes += [] if note is None else [note]
            path = fetch(job.source, folder)
        _cut(path, job, folder, outcome)
    except Damaged as error:
        reason = NO_SOUND if "no audio track" in str(error) else UNREADABLE
        outcome.dropped.append((f"whole video ({error})", reason))
    except Interrupted:
        raise
    except UserError as error:
        raise UserError(f"{job.source.name}: {error}") from error
    except Exception as error:
        said = str(error) if isinstance(error, OSError) else _told(error)
        raise UserError(
            f"{job.source.name} could not be prepared ({said}), which is not taken for a fault of the video: "
            "put it right and run the same command again"
        ) from error
    if not outcome.pieces:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _told(error: Exception) -> str:
    """An error of a program, with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}; {Path(place.filename).name}, line {place.lineno}"


def _cut(path: Path, job: Job, folder: Path, outcome: Outcome) -> None:
    survey = _look(path, job.faces)
    times = survey.times
    outcome.height, outcome.width = survey.size
    outcome.seconds = float(times[-1] - times[0])
    outcome.fps = (len(times) - 1) / outcome.seconds if outcome.seconds > 0 else 0.0
    if outcome.fps < job.filters.min_fps:
        outcome.dropped.append((f"whole video ({outcome.fps:.1f} a second)", SLOW))
        return
    sound = _sound_in_step(path, survey)
    shown = nearest_frames(times, FPS)
    pose = None if job.source.pose is None else _pose_in_step(job.source.pose, folder, survey, shown)
    if isinstance(pose, str):
        outcome.notes.append(pose)
        pose = None
    heard = min(len(shown), -(-len(sound) * FPS // SAMPLE_RATE))
    if heard < len(shown) - FPS:
        outcome.dropped.append((where(heard, len(shown)), SOUND_ENDS))
    shown = shown[:heard]
    cuts = find_cuts(survey.thumbnails[shown])
    pieces, short = split_shots(cuts, heard, job.filters, useful=job.shortest)
    outcome.dropped += [(where(start, stop), reason) for start, stop, reason in short]
    size = nearest_size(*survey.size, job.sizes)
    kept: list[tuple[Piece, Cut]] = []
    for start, stop in pieces:
        looks = [boxes for frame, boxes in survey.looks.items() if shown[start] <= frame <= shown[stop - 1]]
        samples = _part(sound, start, stop)
        reason = judge_sound(samples, job.filters) or judge_faces(looks, job.filters)
        if reason is None:
            boxes = [found[0] for found in looks if len(found) == 1]
            crop = face_crop(boxes, survey.size, size, job.filters)
            if isinstance(crop, tuple):
                piece = Piece(
                    start=start,
                    frames=folder / f"{start}.npy",
                    samples=folder / f"{start}.sound.npy",
                    face=float(np.median([box.height for box in boxes])),
                    place=face_in_crop(boxes, crop),
                    level_db=_level(samples),
                    n_faces=None if job.faces == "any" else max(map(len, looks)),
                    pose=None if pose is None else folder / f"{start}.pose.npy",
                )
                np.save(piece.samples, samples)
                kept.append((piece, (start, stop, crop)))
                continue
            reason = crop
        outcome.dropped.append((where(start, stop), reason))
    _write_pieces(path, shown, survey.size, size, {piece.frames: cut for piece, cut in kept})
    if pose is not None:
        drawn, number = pose
        poses = {piece.pose: cut for piece, cut in kept if piece.pose is not None}
        _write_pieces(drawn, number, survey.size, size, poses)
    outcome.pieces += [piece for piece, _ in kept]


def where(start: int, stop: int) -> str:
    """A range of frames, for the report."""
    return f"{start / FPS:.1f} - {stop / FPS:.1f} s"


def _part(sound: np.ndarray, start: int, stop: int) -> np.ndarray:
    step = SAMPLE_RATE // FPS
    part = sound[start * step : stop * step]
    return np.pad(part, (0, (stop - start) * step - len(part)))


def _decode(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds, frame), also where the file has no times. Raises Damaged, also for what is cut off."""
    with _reading(), open_media(path, "video", FORMATS) as container:
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
    with _reading():
        return np.rot90(frame.to_ndarray(format="rgb24"), round((frame.rotation or 0) / 90))


def _faces(detect: Detector, name: str, picture: np.ndarray) -> list[Box]:
    try:
        return detect(picture)
    except Exception as error:
        raise UserError(f"the face detector {name} failed ({_told(error)}); mend it and run again") from error


def _look(path: Path, faces: str) -> Survey:
    detect = load_detector(faces)
    times: list[float] = []
    thumbnails: list[np.ndarray] = []
    looks: dict[int, list[Box]] = {}
    size, next_look = (0, 0), -np.inf
    for seconds, frame in _decode(path):
        if times and seconds < times[-1]:
            seconds = times[-1]
        rows, columns = THUMBNAIL
        with _reading():
            thumbnails.append(frame.reformat(columns, rows, "gray", interpolation="AREA").to_ndarray())
        if seconds >= next_look:
            picture = _upright(frame)
            size = picture.shape[:2]
            looks[len(times)] = _faces(detect, faces, picture)
            next_look = seconds + LOOK_SECONDS
        times.append(seconds)
    return Survey(np.array(times), np.stack(thumbnails), looks, size, float(times[0]))


def _sound_in_step(path: Path, survey: Survey) -> np.ndarray:
    """Mono sound of 16 kHz whose first sample belongs to the first frame. Raises Damaged without any."""
    with _reading(), open_media(path, "video", FORMATS) as container:
        samples = load_sound(path).samples
        stream = container.streams.audio[0]
        begins = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
    late = round((begins - survey.start) * SAMPLE_RATE)
    return np.pad(samples, (late, 0)) if late > 0 else samples[-late:]


def _pose_in_step(
    source: Source, folder: Path, survey: Survey, shown: np.ndarray
) -> tuple[Path, np.ndarray] | str:
    """A pose's file, and which of its frames belongs to each frame of the video that is `shown`; or why the
    pose is of no use."""
    try:
        with _reading():
            path = fetch(source, folder, "pose")
        pose = _look(path, "any")
    except Damaged:
        return POSE_UNREADABLE
    stretch = np.log(np.divide(pose.size, survey.size))
    if abs(stretch[0] - stretch[1]) > POSE_STRETCH:
        return POSE_SHAPE
    if len(pose.times) == len(survey.times):  # drawn frame by frame: whatever rate it was written with
        return path, shown
    frames = nearest_frames(pose.times, FPS)
    if abs(len(frames) - len(shown)) > POSE_SLACK:
        return POSE_LENGTH
    return path, frames[np.minimum(np.arange(len(shown)), len(frames) - 1)]


def _write_pieces(
    path: Path, shown: np.ndarray, whole: tuple[int, int], size: tuple[int, int], cuts: dict[Path, Cut]
) -> None:
    """Decode again and write what is cut out to files, in order.

    `whole`, `size`: (height, width) of the picture that is cut, and of the model's.
    Raises OSError. (Through a memory map a full disk would kill the process instead.)
    """
    frames = _frames_at(path, shown)
    for target, (start, stop, (top, left, height, width)) in cuts.items():
        with open(target, "wb") as file:
            about = {"descr": "|u1", "fortran_order": False, "shape": (stop - start, *size, 3)}
            np.lib.format.write_array_header_1_0(file, about)
            for position, frame in frames:
                if position < start:
                    continue
                picture = _resized(_upright(frame), whole)[top : top + height, left : left + width]
                file.write(_resized(picture, size).tobytes())
                if position == stop - 1:
                    break
            else:
                raise Damaged(f"{path.name} changed while it was read")


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _frames_at(path: Path, shown: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """(position at 25 a second, the frame to show there), in order."""
    position = 0
    for number, (_, frame) in enumerate(_decode(path)):
        while position < len(shown) and shown[position] == number:
            yield position, frame
            position += 1


def _level(samples: np.ndarray) -> float:
    from lavatar_jax.models.speech_level import speech_level_db

    return round(speech_level_db(samples), 1)
