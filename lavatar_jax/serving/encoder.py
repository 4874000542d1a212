"""Marks frames as generated and encodes them, once for everybody who watches."""

from __future__ import annotations

import dataclasses
import time
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from jaxtyping import Float, UInt8

from lavatar_jax.errors import UserError
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.serving.uploads import to_pcm16
from lavatar_jax.serving.watermark import Watermark

OPUS_FRAME = SAMPLE_RATE // 50  # 20 ms
BT709, LIMITED_RANGE = 1, 1
H264_PROFILE = "avc1.42C01F"  # constrained baseline, level 3.1: every browser and phone decodes it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """One frame and its sound: what belongs together from here to the screen, 40 ms at 25 frames/s."""

    time: float  # seconds from the session's start
    video: bytes  # an H.264 access unit, Annex B
    keyframe: bool
    opus: tuple[bytes, ...]  # packets of 20 ms
    pcm: bytes  # 16-bit mono of 16 kHz
    loud: bool  # speech can be heard in it
    made: float  # when it was encoded, by time.monotonic()
    speech: float | None = None  # when the speech had arrived that begins in it, after a pause


def video_size(height: int, width: int, rows: int) -> tuple[int, int]:
    """(height, width) in which frames are sent: whole multiples that reach `rows`, even."""
    scale = max(1, -(-rows // height))
    return tuple(side * scale + side * scale % 2 for side in (height, width))  # type: ignore[return-value]


class Painter:
    """Frames as the model makes them -> marked pictures of the size in which they are sent (YUV 4:2:0)."""

    def __init__(self, size: tuple[int, int], watermark: Watermark | None) -> None:
        self.height, self.width = size
        self._watermark, self._reformatter = watermark, VideoReformatter()

    def paint(self, frames: UInt8[np.ndarray, "T H W 3"]) -> list[av.VideoFrame]:
        pictures = [self._enlarge(frame) for frame in frames]
        if self._watermark:
            self._watermark.embed_luma([_luma(picture) for picture in pictures])
        return pictures

    def _enlarge(self, frame: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
        """Enlarges and converts in one step."""
        return self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24"),
            width=self.width,
            height=self.height,
            format="yuv420p",
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.BICUBIC,
        )


class VideoEncoder:
    """Frames uint8 [H, W, 3] -> H.264 access units, each decodable as soon as it is there.

    A keyframe at least every second, so that newcomers and those who lost packets see a picture soon.
    """

    def __init__(self, size: tuple[int, int], fps: int, bit_rate: int, watermark: Watermark | None) -> None:
        self.height, self.width = size
        self._fps, self._painter = fps, Painter(size, watermark)
        self._count, self._forced = 0, False
        codec = av.CodecContext.create("libx264", "w")
        codec.height, codec.width = size
        codec.pix_fmt, codec.time_base, codec.framerate = "yuv420p", Fraction(1, fps), Fraction(fps)
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE
        codec.thread_count = 1
        rate = bit_rate // 1000
        x264 = f"keyint={fps - 1}:min-keyint=1:scenecut=0:vbv-maxrate={rate}:vbv-bufsize={rate}"
        codec.options = {
            "preset": "veryfast", "tune": "zerolatency", "profile": "baseline", "crf": "23",
            "forced-idr": "1", "x264-params": x264,
        }  # fmt: skip
        self._codec = codec

    def force_keyframe(self) -> None:
        """Somebody new is watching."""
        self._forced = True

    def encode(self, frames: UInt8[np.ndarray, "T H W 3"]) -> list[tuple[bytes, bool]]:
        """One (access unit, is it a keyframe) for each frame."""
        return [self._encode(picture) for picture in self._painter.paint(frames)]

    def _encode(self, picture: av.VideoFrame) -> tuple[bytes, bool]:
        picture.pts, picture.time_base = self._count, Fraction(1, self._fps)
        picture.pict_type = PictureType.I if self._forced else PictureType.NONE
        self._count, self._forced = self._count + 1, False
        (packet,) = self._codec.encode(picture)
        return bytes(packet), packet.is_keyframe


def _luma(picture: av.VideoFrame) -> UInt8[np.ndarray, "H W"]:
    """A view into the picture."""
    plane = picture.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # type: ignore[call-overload]
    return rows[: picture.height, : picture.width]


class SoundEncoder:
    """Mono sound of 16 kHz -> Opus packets of 20 ms."""

    def __init__(self) -> None:
        self._codec = av.CodecContext.create("libopus", "w")
        self._codec.sample_rate, self._codec.layout, self._codec.format = SAMPLE_RATE, "mono", "flt"
        self._codec.bit_rate = 32_000
        self._codec.options = {"application": "audio", "frame_duration": "20", "vbr": "on"}
        self._position = 0

    def encode(self, samples: Float[np.ndarray, " n"]) -> tuple[bytes, ...]:
        """One packet for each 20 ms, of which the sound must have a whole number."""
        packets = []
        for piece in samples.reshape(-1, OPUS_FRAME):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece[None], np.float32), "flt", "mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, self._position
            frame.time_base = Fraction(1, SAMPLE_RATE)
            self._position += len(piece)
            packets += [bytes(packet) for packet in self._codec.encode(frame)]
        return tuple(packets)


def silent_packet() -> bytes:
    """20 ms of silence, for where nothing is ready."""
    return SoundEncoder().encode(np.zeros(2 * OPUS_FRAME, np.float32))[-1]


class Encoder:
    """Parts of blocks -> moments."""

    def __init__(
        self, size: tuple[int, int], fps: int, bit_rate: int, watermark: Watermark | None = None
    ) -> None:
        if SAMPLE_RATE // fps % OPUS_FRAME:
            raise UserError(f"live sound goes in packets of 20 ms, which {fps} frames/s are no multiple of")
        self.video, self.sound = VideoEncoder(size, fps, bit_rate, watermark), SoundEncoder()
        self._fps = fps

    def encode(self, time_: float, frames: UInt8[np.ndarray, "T H W 3"], sound: np.ndarray) -> list[Moment]:
        """A part of a block that begins at `time_` on the session's clock."""
        moments = []
        for index, (video, keyframe) in enumerate(self.video.encode(frames)):
            size = len(sound) // len(frames)
            piece = np.clip(sound[index * size : (index + 1) * size], -1.0, 1.0)
            loud = bool(np.square(piece).mean() > 1e-4)  # -40 dB
            moments.append(
                Moment(
                    time=time_ + index / self._fps,
                    video=video,
                    keyframe=keyframe,
                    opus=self.sound.encode(piece),
                    pcm=to_pcm16(piece),
                    loud=loud,
                    made=time.monotonic(),
                )
            )
        return moments
