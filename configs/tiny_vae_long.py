"""Stage 0 of the small model, second part: the VAE learns to go on for as long as a video lasts.

What a latent becomes depends on up to 100 frames before it. A VAE that never saw that many drifts away after
the longest clip it was trained on, by more than 10 dB.
"""

from configs.tiny_vae import MODEL
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.vae import VAELossConfig, VAERun


def get_config() -> VAERun:
    return VAERun(
        model=MODEL,
        init="runs/vae_short",
        samples=SamplesConfig(records=3),
        data=ClipsConfig(
            folder="runs/clips_long", clips=300, frames=97, crop_frames=97, full_share=0.08, seed=1
        ),
        loss=VAELossConfig(kl=4e-4, latent_noise=0.02, square=8.0),
        train=LoopConfig(seconds=1500, learning_rate=2e-3, batch=1, ema_decay=0.99, checkpoint_seconds=120),
    )
