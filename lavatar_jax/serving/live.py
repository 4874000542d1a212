"""`serve.py live`: speak into a page, and the avatar speaks."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from lavatar_jax.errors import UserError
from lavatar_jax.serving.ice import check_ice_servers

MOST = 4  # each makes the start longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Live:
    """Serve live avatars: open the printed address in a browser and speak."""

    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Where to listen. Anything but this machine itself needs an API key."""
    port: int = 8765
    model: Annotated[str, arg(metavar="NAME|DIR")] = "tiny"
    """The bundled small model, or a folder with a converted one."""
    sessions: int | None = None
    """How many avatars can speak at once (default: what this machine holds, measured at the start)."""
    queue: int = 0
    """How many requests for a session may wait for a place; others are told that the server is busy."""
    devices: int = 1
    """Accelerators to use, as for generate."""
    faces: Annotated[Path | None, arg(metavar="DIR")] = None
    """A folder with more faces to choose from."""
    api_key_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """A file with the key that opens sessions (or in the environment: LAVATAR_API_KEY)."""
    name: Annotated[tuple[str, ...], arg(metavar="NAME")] = ()
    """Names under which browsers may reach it, such as avatar.example.org."""
    tls_cert: Annotated[Path | None, arg(metavar="PEM")] = None
    """Certificate, with --tls-key: browsers give pages elsewhere a microphone only over https."""
    tls_key: Annotated[Path | None, arg(metavar="PEM")] = None
    tts: Literal["auto", "off", "flite", "festival", "http"] = "auto"
    """Who speaks what is typed; auto: what is installed."""
    tts_url: Annotated[str | None, arg(metavar="URL")] = None
    """A text-to-speech service with OpenAI's interface."""
    data: Annotated[Path, arg(metavar="DIR")] = Path("lavatar_live")
    """Where consents are recorded."""
    recordings: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where recordings are kept while their session lives (default: a temporary folder)."""
    state: Annotated[Path | None, arg(metavar="DIR")] = None
    """Save sessions here when stopped, and go on with them when started again."""
    idle: float = 600.0
    """Seconds without a word after which a session is closed."""
    bit_rate: int = 1_500_000
    """Largest bit rate of the video."""
    watermark: bool = True
    """Mark frames invisibly as generated."""
    watermark_key_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """A secret for the mark, which then only its owner can find."""
    c2pa_cert: Annotated[Path | None, arg(metavar="PEM")] = None
    """Certificate chain that signs recordings as "AI generated", with --c2pa-key."""
    c2pa_key: Annotated[Path | None, arg(metavar="PEM")] = None
    ice_server: Annotated[tuple[str, ...], arg(metavar="URL")] = ()
    """For clients behind routers: stun:HOST, or turn:HOST with LAVATAR_TURN_USERNAME and _CREDENTIAL set."""
    open: bool = True
    """Open the page in a browser, where there is one."""

    def run(self) -> None:
        """Checks everything a user gave, then loads the model and serves until stopped. Raises UserError."""
        try:
            import aiortc  # noqa: F401
            import fastapi  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"live needs {error.name}, which is not installed: pip install '.[serve]'"
            ) from None
        self._check()

        from lavatar_jax.serving.config import ServerConfig
        from lavatar_jax.serving.security import check_exposure

        config = ServerConfig(
            host=self.host,
            port=self.port,
            api_key=_secret(self.api_key_file, os.environ.get("LAVATAR_API_KEY")),
            hosts=self.name,
            idle=self.idle,
            measure_places=self.sessions is None,
            queue=self.queue,
            bit_rate=self.bit_rate,
            watermark=self.watermark,
            watermark_key=(_secret(self.watermark_key_file) or "").encode() or None,
            c2pa_certificate=self.c2pa_cert,
            c2pa_key=self.c2pa_key,
            faces=self.faces,
            data=self.data,
            recordings=self.recordings,
            state=self.state,
            tts=self.tts,
            tts_url=self.tts_url,
            ice_servers=self.ice_server,
        )
        check_exposure(config.host, config.api_key)

        from lavatar_jax.inference.load_host import prepare_host
        from lavatar_jax.serving.app import create_app, find_extras
        from lavatar_jax.serving.logs import log_as_json
        from lavatar_jax.serving.server import check_address, serve

        extras = find_extras(config)
        check_address(config)
        load = prepare_host(self.model, self.devices)

        log_as_json()
        scheme = "https" if self.tls_cert else "http"
        shown = f"[{self.host}]" if ":" in self.host else self.host
        address = f"{scheme}://{shown}:{self.port}/"
        app = create_app(load(self.sessions or self._most()), config, extras)
        print(f"serving on {address} (Ctrl-C stops)", file=sys.stderr)
        if self.open and sys.stderr.isatty() and _has_screen():
            threading.Timer(1.0, webbrowser.open, [address]).start()
        serve(app, config, self.tls_cert, self.tls_key)

    def _check(self) -> None:
        limits = {"port": (1, 65535), "sessions": (1, 1024), "queue": (0, 1000), "devices": (1, 1024)}
        for name, (low, high) in (limits | {"bit_rate": (100_000, 50_000_000)}).items():
            given = getattr(self, name)
            if given is not None and not low <= given <= high:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {given}: give a number from {low} to {high}")
        if not self.idle >= 1:
            raise UserError(f"--idle {self.idle}: give seconds, at least 1")
        check_ice_servers(self.ice_server)
        for one, other in (("tls_cert", "tls_key"), ("c2pa_cert", "c2pa_key")):
            given = [getattr(self, name) for name in (one, other)]
            if (given[0] is None) != (given[1] is None):
                options = f"--{one} and --{other}".replace("_", "-")
                raise UserError(f"{options} belong together; give both")
            for path in given:
                if path is not None and not path.is_file():
                    raise UserError(f"{path}: no such file")
        if self.tls_cert is not None and self.tls_key is not None:
            from lavatar_jax.serving.server import check_certificate

            check_certificate(self.tls_cert, self.tls_key)
        for folder in (self.recordings, self.state):
            try:
                if folder is not None:
                    private = 0o700 if folder == self.state else 0o777
                    folder.mkdir(parents=True, exist_ok=True, mode=private)
            except OSError as error:
                raise UserError(f"{folder}: this folder cannot be made ({error.strerror})") from None
        if self.faces is not None and not self.faces.is_dir():
            raise UserError(f"--faces {self.faces}: there is no such folder")

    def _most(self) -> int:
        """Places to prepare where no number is given. A place of a large model takes gigabytes."""
        return min(MOST, os.cpu_count() or 1) if self.model == "tiny" else 1


def _has_screen() -> bool:
    """Elsewhere a browser in the terminal would come up, in front of the log."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY")
    )


def _secret(path: Path | None, otherwise: str | None = None) -> str | None:
    """The contents of a file, which nobody sees in a list of processes. Raises UserError."""
    if path is None:
        return otherwise or None
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: this file cannot be read") from None
    if not text:
        raise UserError(f"{path}: this file is empty; it should hold a secret")
    return text
