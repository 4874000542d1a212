"""An avatar for LiveKit agents: their speech in, its picture and sound out. Needs the `livekit` extra."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, VideoGenerator

from lavatar_jax.errors import UserError
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.inference.spoken import SpokenBlock
from lavatar_jax.serving.encoder import Painter
from lavatar_jax.serving.level import RunningLevel
from lavatar_jax.serving.uploads import Resampler, to_pcm16

AHEAD = 30.0  # seconds of speech that the session holds


class LiveKitAvatar(VideoGenerator):
    """What an AvatarRunner plays: pictures all the time, sound and its end for each segment of speech.

    `parts`: in which the host hands out blocks. `level`: bring speech to the loudness that the model knows.
    """

    def __init__(self, session: AvatarSession, painter: Painter, *, parts: int, level: bool) -> None:
        self._session, self._painter, self._parts = session, painter, parts
        self._level = RunningLevel() if level else None
        self._resampler = Resampler(SAMPLE_RATE)
        self._speaking = self._heard = self._ending = False
        self._last: int | None = None  # the block in which the segment has certainly ended

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Takes a piece of speech, at any rate and as fast as it comes, or its end."""
        if isinstance(frame, AudioSegmentEnd):
            self._session.end_of_speech()  # its tail does not wait for more
            self._ending = self._speaking
            return
        if frame.sample_rate != self._resampler.rate:
            self._resampler = Resampler(frame.sample_rate)
        channels = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
        samples = self._resampler(channels.mean(axis=1).astype(np.float32) / 32768.0)
        samples = self._level(samples) if self._level else samples
        while self._session.queued_seconds > AHEAD:
            await asyncio.sleep(0.05)
        try:
            self._session.push_audio(samples)
        except UserError:
            return  # the session is over; the iterator ends, too
        self._speaking, self._ending, self._last = True, False, None

    def clear_buffer(self) -> None:
        """Stops talking."""
        self._session.interrupt()
        self._speaking = self._heard = self._ending = False
        self._last = None

    def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        return self._play()

    async def _play(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        while True:
            block = await asyncio.to_thread(self._session.read, 0.5)
            if block is None:
                if self._session.outbox.closed:
                    return
                continue
            pictures = await asyncio.to_thread(self._painter.paint, block.frames)
            sounds = np.split(block.sound, len(pictures))
            for picture, sound in zip(pictures, sounds, strict=True):
                data = picture.to_ndarray().tobytes()
                yield rtc.VideoFrame(picture.width, picture.height, rtc.VideoBufferType.I420, data)
                self._heard = self._heard or (self._speaking and bool(sound.any()))
                if self._heard:
                    yield rtc.AudioFrame(to_pcm16(sound), SAMPLE_RATE, 1, len(sound))
            if self._has_ended(block):
                self._speaking = self._heard = self._ending = False
                self._last = None
                yield AudioSegmentEnd()

    def _has_ended(self, block: SpokenBlock) -> bool:
        """All of a segment is out. Its tail may be in the block after the one that took the last sample."""
        session = self._session
        if not self._ending:
            return False
        if self._last is None and session.queued_seconds == 0.0:
            self._last = session.fed + session.stats.held
        return self._last is not None and block.index >= self._last and block.part == self._parts - 1
