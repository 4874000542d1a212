"""Which function trains which kind of run."""

from __future__ import annotations

from typing import Any

from lavatar_jax.errors import UserError


def train(config: Any) -> None:
    """Train the stage that a config file describes. Raises UserError."""
    from lavatar_jax.training.vae import VAERun, train_vae

    if isinstance(config, VAERun):
        train_vae(config)
        return
    from lavatar_jax.training.diffusion_forcing import DiTRun, train_dit

    if not isinstance(config, DiTRun):
        raise UserError(f"get_config() must return a VAERun or a DiTRun, not a {type(config).__name__}")
    train_dit(config)
