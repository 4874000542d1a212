"""Stage 0 of the small model: a Wan 2.2 VAE at small width, 128 x 128 pixels -> 8 x 8 x 48 per 4 frames."""

from lavatar_jax.config import VAEConfig
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.vae import VAELossConfig, VAERun


def get_config() -> VAERun:
    return VAERun(
        model=VAEConfig(
            kind="wan22",
            width=48,
            multipliers=(1, 2, 2),
            res_blocks=1,
            temporal_downsample=(True, True),
            latent_channels=48,
            patch=4,
            latent_mean=(0.0,) * 48,
            latent_std=(1.0,) * 48,
        ),
        data=ClipsConfig(),
        loss=VAELossConfig(kl=2e-4, latent_noise=0.05),
        train=LoopConfig(seconds=1800, learning_rate=2e-3, batch=12, ema_decay=0.995, checkpoint_seconds=120),
    )
