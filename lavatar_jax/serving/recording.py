"""A session as a file that can be played at any moment: fragmented MP4, from the packets that are sent."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from lavatar_jax.errors import UserError
from lavatar_jax.files import write_errors
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.serving.encoder import Moment

NAME = Path("the recording")  # in messages; where it lies is nobody's business
AAC_RATE = 48_000
# One fragment for each group of pictures; nothing is written again, so that what is there can be read.
MOVFLAGS = "delay_moov+frag_keyframe+default_base_moof"


class Recording:
    """Writes moments, from the first keyframe on. `write` and `close` are for one thread, the rest for any.

    What is played is what the model made: holes that a slow machine caused on the way are not in it.
    """

    def __init__(self, path: Path, *, size: tuple[int, int], fps: int, seconds: float, nbytes: int) -> None:
        """`seconds`, `nbytes`: the largest file. Raises UserError when there can be none."""
        self.path, self._size, self._fps = path, size, fps
        self._most = (round(seconds * fps), nbytes)
        self.frames = 0
        self.state = "on"  # off, failed
        self.error: str | None = None
        self.signed = False
        self._lock = threading.Lock()
        with write_errors(NAME):
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in close()
        self._container: av.container.OutputContainer | None = None

    @property
    def seconds(self) -> float:
        return self.frames / self._fps

    @property
    def bytes(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0

    def about(self) -> dict[str, object]:
        """As clients see it."""
        return {
            "state": self.state,
            "seconds": round(self.seconds, 2),
            "bytes": self.bytes,
            "signed": self.signed,
        }

    def write(self, moments: list[Moment]) -> None:
        """Raises UserError when the disk is full or the file is as long as it may be; it is closed then, and
        stays playable."""
        with self._lock:
            if self.state != "on":
                return
            try:
                with write_errors(NAME):
                    for moment in moments:
                        if self.frames or moment.keyframe:
                            self._write(moment)
                if self.frames >= self._most[0] or self.bytes >= self._most[1]:
                    raise UserError("the recording is as long as it may be; what there is can be downloaded")
            except UserError as error:
                self._close("failed")
                self.error = str(error)
                raise

    def close(self) -> None:
        """Completes the file. A second call changes nothing."""
        with self._lock:
            if self.state == "on":
                self._close("off")

    def _close(self, state: str) -> None:
        self.state = state
        with contextlib.suppress(av.FFmpegError, OSError):  # of a file that failed, the end fails too
            if self._container is not None:
                self._container.mux(self._sound.encode(None))
                self._container.close()
        self._file.close()

    def _write(self, moment: Moment) -> None:
        container = self._container or self._open()
        packet = av.Packet(moment.video)
        packet.stream, packet.time_base = self._video, Fraction(1, self._fps)
        packet.pts = packet.dts = self.frames
        packet.duration, packet.is_keyframe = 1, moment.keyframe
        container.mux(packet)
        samples = np.frombuffer(moment.pcm, "<i2")[None]
        frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        frame.sample_rate, frame.time_base = SAMPLE_RATE, Fraction(1, SAMPLE_RATE)
        frame.pts = self.frames * (SAMPLE_RATE // self._fps)
        container.mux(self._sound.encode(frame))
        self.frames += 1

    def _open(self) -> av.container.OutputContainer:
        file = _Appended(self._file)
        self._container = container = av.open(file, "w", format="mp4", options={"movflags": MOVFLAGS})
        self._video = container.add_mux_stream(
            "h264", rate=self._fps, width=self._size[1], height=self._size[0]
        )
        self._sound = container.add_stream("aac", rate=AAC_RATE, layout="mono")
        self._sound.bit_rate = 64_000
        return container


class _Appended(io.RawIOBase):
    """A file without a way back: the muxer then writes nothing twice."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = memoryview(data)
        while len(view):  # a disk that is nearly full takes a part
            view = view[self._file.write(view) :]
        return len(data)
