"""A session over WebRTC: microphone up, picture and sound down, events on a data channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from fractions import Fraction
from typing import Any

import aioice.ice
import av
import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError
from aiortc.sdp import SessionDescription

from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.serving.encoder import silent_packet
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.playout import Sent
from lavatar_jax.serving.room import Room
from lavatar_jax.serving.verbs import Verbs

log = logging.getLogger(__name__)
BEHIND = 50  # packets that may wait to be sent
VIDEO_CLOCK, SOUND_CLOCK = 90_000, 48_000
OPUS_TICKS = SOUND_CLOCK // 50
PATIENCE = 30.0  # seconds from an offer to a connection
SILENCE = 12.0  # seconds without a packet from a client: it has gone without a word
OFFER_BYTES = 100_000


def offer_loopback() -> None:
    """On a machine without a network, let WebRTC use the loopback interface, which aioice leaves out."""
    found = aioice.ice.get_host_addresses

    def addresses(use_ipv4: bool, use_ipv6: bool) -> list[str]:
        return found(use_ipv4, use_ipv6) or ["127.0.0.1"]

    aioice.ice.get_host_addresses = addresses


class Track(MediaStreamTrack):
    """Packets that were encoded elsewhere, in the order in which they are put."""

    def __init__(self, kind: str, dropped: Any) -> None:
        super().__init__()
        self.kind = kind
        self._packets: asyncio.Queue[av.Packet] = asyncio.Queue()
        self._dropped = dropped
        self._needs_keyframe = kind == "video"

    def put(self, data: bytes, ticks: int, clock: int, *, keyframe: bool = True) -> None:
        if self._needs_keyframe and not keyframe:
            return
        if self._packets.qsize() >= BEHIND:
            self._dropped.inc(self.kind == "video")
            self._needs_keyframe = self.kind == "video"
            return
        self._needs_keyframe = False
        packet = av.Packet(data)
        packet.pts, packet.time_base = ticks, Fraction(1, clock)
        self._packets.put_nowait(packet)

    async def recv(self) -> av.Packet:
        if self.readyState != "live":
            raise MediaStreamError
        return await self._packets.get()


class Call:
    """A connection to a room. `answer` it; it leaves the room by itself when the client has gone."""

    def __init__(
        self,
        room: Room,
        verbs: Verbs,
        *,
        controls: bool,
        ice_servers: list[dict[str, str]],
        dropped: Any,
    ) -> None:
        self.id = secrets.token_hex(8)
        self.controls = controls
        self.owns_room = False  # the session ends with the call
        self._room, self._verbs = room, verbs
        verbs.tell = self.tell
        servers = [RTCIceServer(**about) for about in ice_servers]  # none: nobody is asked
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        self._video, self._sound = Track("video", dropped), Track("audio", dropped)
        self._silence = silent_packet()
        self._channel: RTCDataChannel | None = None
        self._early: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._joined = self._closed = False
        self._peer.on("track", self._on_track)
        self._peer.on("datachannel", self._on_channel)
        self._peer.on("connectionstatechange", self._on_state)

    # ---- to the client ---------------------------------------------------------------------------------

    def show(self, sent: Sent) -> None:
        moment = sent.moment
        if sent.sound:
            ticks = round(sent.time * SOUND_CLOCK)
            packets = (self._silence, self._silence) if moment is None else moment.opus
            for index, packet in enumerate(packets):
                self._sound.put(packet, ticks + index * OPUS_TICKS, SOUND_CLOCK)
        if moment is not None:
            self._video.put(
                moment.video, round(sent.time * VIDEO_CLOCK), VIDEO_CLOCK, keyframe=moment.keyframe
            )

    def tell(self, event: str) -> None:
        if self._channel is None:
            self._early = [*self._early[-20:], event]
        elif self._channel.readyState == "open" and self._channel.bufferedAmount < 1 << 20:
            with contextlib.suppress(Exception):  # it may close under our hands
                self._channel.send(event)

    # ---- the connection --------------------------------------------------------------------------------

    async def answer(self, sdp: str) -> str:
        """The answer to an offer. Raises ApiError 400 and 415, and 404 when the session ends meanwhile."""
        offer = checked_offer(sdp)
        self._room.calls[self.id] = self  # before anything is waited for: it counts from here on
        self._spawn(self._give_up())
        wanted = {media.kind: media.direction for media in offer.media}
        try:
            for track, direction in ((self._sound, wanted.get("audio")), (self._video, wanted.get("video"))):
                if direction in ("recvonly", "sendrecv"):
                    self._peer.addTrack(track)
            await self._peer.setRemoteDescription(RTCSessionDescription(str(offer), "offer"))
            await self._peer.setLocalDescription(await self._peer.createAnswer())
            self._room.check_open()
        except Exception as error:  # whatever is wrong with a stranger's text
            await self.hang_up("refused")
            self._room.check_open()
            log.info("offer refused: %s", type(error).__name__)
            raise ApiError(400, "bad_request", "That offer cannot be answered.") from None
        return self._peer.localDescription.sdp

    async def hang_up(self, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._room.leave(self)
        self._room.calls.pop(self.id, None)
        if self.owns_room:
            self._ending = asyncio.get_running_loop().create_task(self._room.stop("closed"))
        self._verbs.stop()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._video.stop()
        self._sound.stop()
        await self._peer.close()

    async def _give_up(self) -> None:
        await asyncio.sleep(PATIENCE)
        if self._peer.connectionState != "connected":
            await self.hang_up("not connected")

    async def _notice_silence(self) -> None:
        """A client that was killed says no goodbye, and ICE takes half a minute to notice. Whoever is there
        sends at least reports of what it received, every few seconds."""
        received, since = 0, time.monotonic()
        while time.monotonic() - since < SILENCE:
            await asyncio.sleep(min(1.0, SILENCE / 4))
            now = await self._received()
            if now is None:  # no media in either direction: left to ICE
                return
            if now != received:
                received, since = now, time.monotonic()
        log.info("a client has fallen silent", extra={"session": self._room.identity.id})
        await self.hang_up("gone")

    async def _received(self) -> int | None:
        """Packets of any kind that came from the client; None: nobody counts."""
        stats: Any = (await self._peer.getStats()).values()
        counts = [found.packetsReceived for found in stats if found.type == "transport"]
        return sum(counts) if counts else None

    def _on_state(self) -> None:
        if self._peer.connectionState == "connected" and not (self._joined or self._closed):
            if self._room.reason is not None:
                self._spawn(self.hang_up("closed"))
                return
            self._joined = True  # not before: what was put earlier would come late, and all at once
            self._room.join(self)
            self._spawn(self._notice_silence())
        if self._peer.connectionState in ("failed", "closed", "disconnected") and not self._closed:
            self._spawn(self.hang_up("gone"))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- from the client -------------------------------------------------------------------------------

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if self._channel is not None:
            return
        self._channel = channel
        channel.on("message", lambda message: self._spawn(self._obey(message)))
        for event in self._early:
            self.tell(event)
        self._early = []

    async def _obey(self, message: str | bytes) -> None:
        await self._verbs.obey(message)
        if self._verbs.hopeless:
            await self.hang_up("malformed")

    def _on_track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio" and self.controls:
            self._spawn(self._listen(track))

    async def _listen(self, track: MediaStreamTrack) -> None:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        try:
            while True:
                frame: Any = await track.recv()
                if not self._room.voice.admits(frame.samples / frame.sample_rate):
                    continue
                for part in resampler.resample(frame):
                    self._room.voice.microphone(part.to_ndarray()[0].astype(np.float32))
        except MediaStreamError:
            self._room.voice.microphone_stopped()


def checked_offer(sdp: str) -> SessionDescription:
    """An offer that can be answered, without the video codecs that we do not send. Raises ApiError.

    What is missing here would only be missed later, in a task where nobody could be told.
    """
    if len(sdp) > OFFER_BYTES:
        raise ApiError(413, "too_large", "That offer is too long.")
    try:
        offer = SessionDescription.parse(sdp)
        kinds = [media.kind for media in offer.media]
    except Exception:
        raise ApiError(400, "bad_request", "That is no offer in SDP.") from None
    if not kinds or len(kinds) > 8 or set(kinds) - {"audio", "video", "application"}:
        raise ApiError(400, "bad_request", "That is no offer in SDP.")
    for kind in ("audio", "video"):
        if kinds.count(kind) > 1:
            raise ApiError(400, "bad_request", f"Offer one {kind} at most.")
    for media in offer.media:
        ice, dtls = media.ice, media.dtls
        if not (ice and ice.usernameFragment and ice.password and dtls and dtls.fingerprints):
            raise ApiError(400, "bad_request", "The offer says nothing about ICE or DTLS.")
        if media.kind == "video" and media.port:
            kept = {codec.payloadType for codec in media.rtp.codecs if codec.mimeType.lower() == "video/h264"}
            repeats = {
                codec.payloadType
                for codec in media.rtp.codecs
                if codec.mimeType.lower() == "video/rtx" and codec.parameters.get("apt") in kept
            }
            if not kept:
                raise ApiError(415, "unsupported_media", "Video is sent as H.264, which this offer has not.")
            media.rtp.codecs = [c for c in media.rtp.codecs if c.payloadType in kept | repeats]
            media.fmt = [c.payloadType for c in media.rtp.codecs]
    return offer
