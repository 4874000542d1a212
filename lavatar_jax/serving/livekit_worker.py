"""`serve.py livekit`: joins a LiveKit room as the avatar of an agent."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from lavatar_jax.errors import UserError
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.inference.images import load_image

if TYPE_CHECKING:
    from lavatar_jax.inference.session_host import SessionHost


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveKit:
    """Join a LiveKit room as an agent's avatar; the token is in the environment: LIVEKIT_TOKEN."""

    url: Annotated[str, arg(metavar="URL")]
    """The LiveKit server: wss://..."""
    image: Annotated[Path, arg(metavar="IMAGE")] = SAMPLES / "face.png"
    """Photo of the person."""
    prompt: Annotated[str, arg(metavar="TEXT")] = "a person talking"
    """How they look and behave."""
    model: Annotated[str, arg(metavar="NAME|DIR")] = "tiny"
    """The bundled small model, or a folder with a converted one."""
    devices: int = 1
    """Accelerators to use, as for generate."""
    rows: int = 512
    """Smaller videos are enlarged to at least so many rows."""
    watermark: bool = True
    """Mark frames invisibly as generated."""

    def run(self) -> None:
        """Until the room is left. Raises UserError."""
        token = os.environ.get("LIVEKIT_TOKEN")
        if not token:
            raise UserError("livekit needs the token of a participant, in the environment: LIVEKIT_TOKEN")
        if not self.url.startswith(("ws://", "wss://")):
            raise UserError(f"--url {self.url}: give an address that begins with ws:// or wss://")
        if not 1 <= self.devices <= 1024:
            raise UserError(f"--devices {self.devices}: give a number from 1 to 1024")
        load_image(self.image)
        try:
            from livekit import rtc
            from livekit.agents.voice.avatar import DataStreamAudioReceiver
        except ImportError:
            raise UserError(
                "livekit needs livekit-agents, which is not installed: pip install '.[livekit]'"
            ) from None

        from lavatar_jax.inference.load_host import prepare_host

        host = prepare_host(self.model, self.devices)(1)
        host.start()

        async def join() -> None:
            room = rtc.Room()
            try:
                await room.connect(self.url, token)
            except Exception as error:
                raise UserError(f"--url {self.url}: cannot join ({type(error).__name__})") from None
            try:
                await self.serve(room, DataStreamAudioReceiver(room), host)
            finally:
                await room.disconnect()

        try:
            asyncio.run(join())
        finally:
            host.close()

    async def serve(self, room: Any, receiver: Any, host: SessionHost) -> None:
        """Plays the avatar in a room that has been joined, until it is left or the session ends."""
        from livekit.agents.voice.avatar import AvatarOptions, AvatarRunner

        from lavatar_jax.inference.sound import SAMPLE_RATE
        from lavatar_jax.serving.encoder import Painter, video_size
        from lavatar_jax.serving.livekit_avatar import LiveKitAvatar
        from lavatar_jax.serving.watermark import Watermark

        config = host.avatar.config
        height, width = video_size(*host.size, self.rows)
        left = asyncio.Event()
        room.on("disconnected", lambda *_: left.set())
        session = await asyncio.to_thread(host.open, load_image(self.image), prompt=self.prompt)
        painter = Painter((height, width), Watermark() if self.watermark else None)
        avatar = LiveKitAvatar(session, painter, parts=host.parts, level=config.speech is None)
        options = AvatarOptions(
            video_width=width,
            video_height=height,
            video_fps=config.fps,
            audio_sample_rate=SAMPLE_RATE,
            audio_channels=1,
        )
        runner = AvatarRunner(room, audio_recv=receiver, video_gen=avatar, options=options)
        try:
            await runner.start()
            playing = asyncio.ensure_future(runner.wait_for_complete())
            leaving = asyncio.ensure_future(left.wait())
            await asyncio.wait({playing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (playing, leaving):
                task.cancel()
        finally:
            session.close("the room was left")
            await runner.aclose()
