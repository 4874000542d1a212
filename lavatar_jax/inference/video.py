"""MP4 in and out: frames and sound written side by side while they are made.

The sound is pulled in step with the frames, so both tracks end together wherever the video ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from lavatar_jax.errors import UserError
from lavatar_jax.files import temporary_name, write_errors
from lavatar_jax.inference.inputs import open_media
from lavatar_jax.inference.sound import TRACK_RATE, Sound, load_sound

FPS = 25
FORMATS = "MP4, MOV, MKV or WebM"
LARGEST = 8192  # rows or columns; more is beyond H.264 decoders
BT709 = 1  # one code for matrix, primaries and transfer; without it players guess, and skin changes colour
LIMITED_RANGE = 1


def default_scale(height: int) -> int:
    """How many times small frames are enlarged, so that a video has at least 512 rows."""
    return -(-512 // height) if height <= 256 else 1


class VideoWriter:
    """Writes blocks of frames and a track of sound to an MP4 file (H.264, AAC).

        with VideoWriter(path, audio=sound.track(), channels=sound.channels) as writer:
            for frames in blocks:
                writer.write(frames)

    The file appears under its name when it is complete. Ctrl-C (KeyboardInterrupt) inside the `with`
    completes it with what there is; any other error removes it. Memory does not grow with the length
    of the video (but for the index of an MP4 file, some 30 bytes a frame).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        scale: int | None = None,
        fps: int = FPS,
        audio: Iterator[np.ndarray] | None = None,
        channels: int = 1,
    ) -> None:
        """`scale` enlarges (None: small frames to at least 512 rows).

        `audio` yields float32 [channels, n] at TRACK_RATE; silence follows where it ends too early.
        """
        self.path = Path(path)
        self.frames = 0  # written so far
        self._scale, self._fps = scale, fps
        self._audio = None if audio is None else _Tape(audio, channels)
        self._part = temporary_name(self.path)
        self._container: av.container.OutputContainer | None = None
        self._reformatter = VideoReformatter()

    def write(self, frames: np.ndarray) -> None:
        """Appends uint8 [T, H, W, 3] and the sound that belongs to them. Raises UserError."""
        if not len(frames):
            return
        with write_errors(self.path):
            container = self._container or self._open(*frames.shape[1:3])
            for image in _even(frames):
                container.mux(self._video.encode(self._picture(image)))
                self.frames += 1
            self._catch_up(container)

    def _open(self, height: int, width: int) -> av.container.OutputContainer:
        height, width = enlarged(height, width, self._scale)
        # "faststart" moves the index to the front, so that a browser can play before all is loaded.
        self._container = av.open(str(self._part), "w", format="mp4", options={"movflags": "+faststart"})
        options = {"preset": "veryfast", "crf": "18"}
        self._video = self._container.add_stream("libx264", rate=self._fps, options=options)
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        codec = self._video.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE
        if self._audio is not None:
            layout = "mono" if self._audio.channels == 1 else "stereo"
            self._sound = self._container.add_stream("aac", rate=TRACK_RATE, layout=layout)
            self._sound.bit_rate = 64_000 * self._audio.channels
        self._container.start_encoding()
        return self._container

    def _picture(self, image: np.ndarray) -> av.VideoFrame:
        """Enlarges and converts in one step. The reformatter is kept: making its filters costs more."""
        frame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(image, "rgb24"),
            width=self._video.width,
            height=self._video.height,
            format="yuv420p",
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.LANCZOS,
        )
        frame.pts, frame.time_base = self.frames, Fraction(1, self._fps)
        return frame

    def _catch_up(self, container: av.container.OutputContainer) -> None:
        """Writes the sound up to where the frames written so far end."""
        if self._audio is None:
            return
        start = self._audio.position
        end = self.frames * TRACK_RATE // self._fps
        if end > start:
            layout = self._sound.layout.name
            frame = av.AudioFrame.from_ndarray(self._audio.take(end - start), "fltp", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = TRACK_RATE, Fraction(1, TRACK_RATE), start
            container.mux(self._sound.encode(frame))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._container and (kind is None or issubclass(kind, KeyboardInterrupt)):
                with write_errors(self.path):
                    self._finish(self._container)
        finally:
            if self._container:
                with contextlib.suppress(OSError):  # a full disk would be reported a second time
                    self._container.close()
            self._part.unlink(missing_ok=True)

    def _finish(self, container: av.container.OutputContainer) -> None:
        self._catch_up(container)  # Ctrl-C may have come between the two
        container.mux(self._video.encode(None))
        if self._audio is not None:
            container.mux(self._sound.encode(None))
        container.close()
        os.replace(self._part, self.path)


class _Tape:
    """Sound that arrives in pieces and is taken in other pieces; silence after its end."""

    def __init__(self, pieces: Iterator[np.ndarray], channels: int) -> None:
        self.channels = channels
        self.position = 0  # samples taken
        self._pieces = pieces
        self._rest = np.zeros((channels, 0), np.float32)

    def take(self, count: int) -> np.ndarray:
        """The next float32 [channels, count]."""
        pieces = [self._rest]
        have = self._rest.shape[1]
        while have < count:
            piece = next(self._pieces, None)
            if piece is None:
                piece = np.zeros((self.channels, count - have), np.float32)
            pieces.append(piece)
            have += piece.shape[1]
        joined = np.concatenate(pieces, axis=1)
        self._rest = joined[:, count:]
        self.position += count
        return np.ascontiguousarray(joined[:, :count])


def _even(frames: np.ndarray) -> np.ndarray:
    """H.264 halves the colour planes, so an odd last row or column is repeated."""
    height, width = frames.shape[1:3]
    return np.pad(frames, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], mode="edge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """A video in memory: frames uint8 [T, H, W, 3] at `fps`, and the sound if there is any."""

    frames: np.ndarray
    fps: float
    sound: Sound | None


def read_video(path: str | Path) -> Video:
    """Decodes a whole video. Raises UserError if it is missing, no video, or damaged."""
    with open_media(path, "video", FORMATS) as container:
        has_sound = bool(container.streams.audio)
        fps = float(container.streams.video[0].average_rate or 0) if container.streams.video else 0
    frames = np.stack(list(read_frames(path)))
    return Video(frames=frames, fps=fps, sound=load_sound(path) if has_sound else None)


def enlarged(height: int, width: int, scale: int | None) -> tuple[int, int]:
    """Sides of a written video whose frames have these: `scale` times as long (None: small ones to at least
    512 rows), and even. Raises UserError where that is too large."""
    scale = scale or default_scale(height)
    height, width = (scale * (side + side % 2) for side in (height, width))
    if max(height, width) > LARGEST:
        raise UserError(f"a video of {width}x{height} is too large; use a smaller --scale")
    return height, width


def read_frames(path: str | Path, fps: int | None = None) -> Iterator[np.ndarray]:
    """Decodes a video frame by frame: uint8 [H, W, 3]. Raises UserError as `read_video` does.

    `fps`: so many frames a second, each the nearest one in time; None: all frames, whenever they are shown.
    """
    frames = _timed_frames(path)
    yield from (image for _, image in frames) if fps is None else _at_rate(frames, fps)


def _at_rate(frames: Iterator[tuple[float, np.ndarray]], fps: int) -> Iterator[np.ndarray]:
    """The last frame is shown for as long as the one before it was."""
    count, start, held = 0, 0.0, 1.0 / fps
    last: tuple[float, np.ndarray] | None = None
    for time, image in frames:
        if last is None:
            start = time
        else:
            held = time - last[0]
            while count / fps < (last[0] + time) / 2 - start:
                yield last[1]
                count += 1
        last = time, image
    while last is not None and count / fps < last[0] + held / 2 - start:
        yield last[1]
        count += 1


def _timed_frames(path: str | Path) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, pixels) of all frames."""
    with open_media(path, "video", FORMATS) as container:
        if not container.streams.video:
            raise UserError(f"{path} has no pictures in it; give a video")
        empty = True
        try:
            for frame in container.decode(video=0):
                empty = False
                yield frame.time or 0.0, frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, ValueError):
            raise UserError(f"{path} is damaged or cut off; give a complete video") from None
        if empty:
            raise UserError(f"{path} has no pictures in it; give a video")
