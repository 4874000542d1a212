"""What a live server allows and where it keeps things: plain numbers, checked once."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a stranger may ask for. Sizes in bytes, times in seconds."""

    image_bytes: int = 10 << 20
    image_pixels: int = 40_000_000
    sound_bytes: int = 25 << 20
    sound_seconds: float = 600.0
    body_bytes: int = 256 << 10  # of every other request
    body_seconds: float = 20.0  # without a byte of a body that was announced
    text_chars: int = 2000
    prompt_chars: int = 1000
    message_bytes: int = 350 << 10  # of one WebSocket message: 256 kB in base64
    malformed: int = 10  # messages a client may get wrong
    connections: int = 8  # of one session
    recording_seconds: float = 3600.0
    recording_bytes: int = 2 << 30
    creations_per_minute: float = 30.0
    creations_burst: int = 10
    requests_per_second: float = 50.0
    requests_burst: int = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server runs. Nothing here is told to clients but what `/v1/config` lists."""

    host: str = "127.0.0.1"
    port: int = 8765
    api_key: str | None = dataclasses.field(default=None, repr=False)
    hosts: tuple[str, ...] = ()  # names under which pages may reach it, besides its own address
    reconnect: float = 30.0  # a session waits so long for its client
    idle: float = 600.0  # and so long for something to say
    kept: float = 60.0  # a closed session's last words and recording
    measure_places: bool = False  # so many as the machine holds, instead of all that the host has
    queue: int = 0  # so many creations may wait for a place
    queue_wait: float = 5.0
    rows: int = 512  # smaller videos are enlarged to at least so many
    bit_rate: int = 1_500_000
    delay: float = 0.08  # before the first frame is sent, so that a late one is not missed
    watermark: bool = True
    watermark_key: bytes | None = dataclasses.field(default=None, repr=False)
    c2pa_certificate: Path | None = None
    c2pa_key: Path | None = None
    faces: Path | None = None
    data: Path = Path("lavatar_live")  # the log of consents
    recordings: Path | None = None  # None: a temporary folder, gone with the server
    state: Path | None = None  # sessions are saved here when the server stops, and go on when it starts
    tts: str = "auto"
    tts_url: str | None = None
    ice_servers: tuple[str, ...] = ()
    limits: Limits = Limits()
