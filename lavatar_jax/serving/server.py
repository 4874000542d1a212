"""Runs the application, and ends it without leaving anybody in the dark."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from lavatar_jax.errors import UserError
from lavatar_jax.serving.config import ServerConfig
from lavatar_jax.serving.media_webrtc import offer_loopback


class Server(uvicorn.Server):
    """Clients are told before their connections are closed."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        found = getattr(self.config.app.state, "services", None)  # type: ignore[union-attr]
        if found is not None:
            with contextlib.suppress(Exception):
                await found.sessions.stop()
        await super().shutdown(sockets)


def make_server(
    app: FastAPI, config: ServerConfig, certificate: Path | None = None, key: Path | None = None
) -> Server:
    return Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # an address that a client states is no address
            ws_max_size=config.limits.message_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=5.0,
            ws_ping_timeout=12.0,  # as long as a WebRTC client may be silent
            limit_concurrency=1000,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=32 << 10,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
    )


def serve(
    app: FastAPI, config: ServerConfig, certificate: Path | None = None, key: Path | None = None
) -> None:
    """Until SIGTERM or Ctrl-C. Raises UserError when the port is taken."""
    offer_loopback()
    check_address(config)
    with contextlib.suppress(KeyboardInterrupt):  # raised again when all has ended well
        make_server(app, config, certificate, key).run()


def check_certificate(certificate: Path, key: Path) -> None:
    """Raises UserError unless a server can speak TLS with these PEM files."""
    try:
        # A key with a password is refused, which would otherwise be asked for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError):  # SSLError is the first
        raise UserError(
            f"--tls-cert {certificate} and --tls-key {key} do not serve: give a PEM certificate and its key, "
            "without a password"
        ) from None


def check_address(config: ServerConfig) -> None:
    """Raises UserError when the port is taken."""
    with contextlib.closing(
        socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    ) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            where = f"--host {config.host} --port {config.port}"
            raise UserError(f"{where}: cannot listen there ({error.strerror}); choose another") from None
