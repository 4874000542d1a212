"""Sessions that outlive a restart: saved when the server stops, picked up when it starts, once."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from lavatar_jax.errors import UserError
from lavatar_jax.files import replacing
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.session_host import SessionHost
from lavatar_jax.serving.room import Identity

log = logging.getLogger(__name__)
STALE = 600.0  # seconds: nobody waits longer for a server to come back


class SavedRooms:
    """Two files a session: what the model remembers, and who may go on with it (digests of tokens only).

    Only their owner can read them, or look into the folder, unless it was there: it stays as it is then.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(
        self, host: SessionHost, session: AvatarSession, identity: Identity, kept: dict[str, Any]
    ) -> None:
        """Raises UserError."""
        host.save(session, self._folder / f"{identity.id}.safetensors")
        about = {
            "id": identity.id,
            "token": identity.token.hex(),
            "viewer_token": identity.viewer_token.hex(),
            "face": identity.face,
            "voice": identity.voice,
            "level": identity.level,
            "saved": time.time(),
            "kept": kept,
        }
        path = self._folder / f"{identity.id}.json"
        with replacing(path) as part:
            part.touch(mode=0o600)  # before there is anything to read
            part.write_text(json.dumps(about))

    def restore(self, host: SessionHost) -> list[tuple[Identity, dict[str, Any], AvatarSession]]:
        """All saved sessions for which there is a place, opened; none of the files is left."""
        found = []
        for path in sorted(self._folder.glob("s_*.json")):
            arrays = path.with_suffix(".safetensors")
            try:
                about = json.loads(path.read_text())
                if time.time() - about["saved"] < STALE:
                    identity = Identity(
                        id=about["id"],
                        token=bytes.fromhex(about["token"]),
                        viewer_token=bytes.fromhex(about["viewer_token"]),
                        face=about["face"],
                        voice=about["voice"],
                        level=about["level"],
                    )
                    found.append((identity, about["kept"], host.restore(arrays)))
            except (UserError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("a saved session cannot go on: %s", type(error).__name__)
            path.unlink(missing_ok=True)
            arrays.unlink(missing_ok=True)
        return found
