"""Stage 0 of the small model: a Wan 2.2 VAE at small width, 128 x 128 pixels -> 16 x 16 x 16 per 4 frames.

On short clips first; `tiny_vae_long.py` goes on with long ones.
"""

from lavatar_jax.config import VAEConfig
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.vae import VAELossConfig, VAERun

MODEL = VAEConfig(
    kind="wan22",
    width=24,
    decoder_width=20,
    multipliers=(1, 2, 4),
    res_blocks=1,
    temporal_downsample=(True, True),
    latent_channels=16,
    patch=2,
    latent_mean=(0.0,) * 16,
    latent_std=(1.0,) * 16,
)


def get_config() -> VAERun:
    return VAERun(
        model=MODEL,
        out="runs/vae_short",
        samples=SamplesConfig(records=3),
        data=ClipsConfig(clips=1400, crop_frames=25),
        loss=VAELossConfig(kl=4e-4, latent_noise=0.02, square=8.0),
        train=LoopConfig(seconds=5000, learning_rate=4e-3, batch=2, ema_decay=0.99, checkpoint_seconds=120),
    )
