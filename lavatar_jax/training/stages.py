"""Which function trains which kind of run."""

from __future__ import annotations

from typing import Any

from lavatar_jax.errors import UserError


def train(config: Any) -> None:
    """Train the stage that a config file describes. Raises UserError."""
    from lavatar_jax.training.checks import check_run
    from lavatar_jax.training.run import Run
    from lavatar_jax.training.vae import VAERun, train_vae

    if isinstance(config, Run):
        check_run(config)
    if isinstance(config, VAERun):
        train_vae(config)
        return
    from lavatar_jax.training.diffusion_forcing import DiTRun, train_dit

    if isinstance(config, DiTRun):
        train_dit(config)
        return
    from lavatar_jax.training.decoder import DecoderRun, train_decoder

    if isinstance(config, DecoderRun):
        train_decoder(config)
        return
    from lavatar_jax.training.distill import DistillRun, train_distill
    from lavatar_jax.training.ode_init import OdeRun, train_ode

    if isinstance(config, OdeRun):
        train_ode(config)
        return
    if not isinstance(config, DistillRun):
        kinds = "a VAERun, a DiTRun, an OdeRun, a DistillRun or a DecoderRun"
        raise UserError(f"get_config() must return {kinds}, not a {type(config).__name__}")
    train_distill(config)
