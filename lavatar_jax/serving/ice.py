"""STUN and TURN servers: which may be named, and what is told about them to whom."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from lavatar_jax.errors import UserError

# Narrower than RFC 7064 and 7065: an IPv6 address is not understood by aiortc.
URL = re.compile(
    r"(stun|turn)s?:[A-Za-z0-9._-]+(:(?P<port>[0-9]{1,5}))?(?P<transport>\?transport=(udp|tcp))?"
)
WORDS = ("LAVATAR_TURN_USERNAME", "LAVATAR_TURN_CREDENTIAL")  # in the environment


def check_ice_servers(urls: Iterable[str]) -> None:
    """Raises UserError for what browsers would refuse: they then have no WebRTC at all."""
    for url in urls:
        found = URL.fullmatch(url)
        possible = found is not None and 0 < int(found["port"] or 1) < 1 << 16
        if found is None or not possible or (found["transport"] and not _relays(url)):
            raise UserError(
                f"--ice-server {url}: give stun:HOST[:PORT], or turn:HOST[:PORT], with ?transport=udp or =tcp"
            )
        if _relays(url) and not all(map(os.environ.get, WORDS)):
            raise UserError(
                f"--ice-server {url}: TURN needs credentials; set {' and '.join(WORDS)} in the environment"
            )


def public_ice_servers(urls: Iterable[str]) -> list[dict[str, str]]:
    """For everybody, as browsers take them: those that ask for nothing."""
    return [{"urls": url} for url in urls if not _relays(url)]


def ice_servers(urls: Iterable[str]) -> list[dict[str, str]]:
    """All, as browsers take them. With credentials: for who holds a session's token, and nobody else."""
    username, credential = (os.environ.get(word, "") for word in WORDS)
    secret = {"username": username, "credential": credential}
    return [{"urls": url} | (secret if _relays(url) else {}) for url in urls]


def _relays(url: str) -> bool:
    return url.startswith("turn")
