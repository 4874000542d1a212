"""Stage 0 at full size, where it is wanted: the published VAE's decoder learns to draw faces more sharply.

The transformer was trained on what the published encoder makes, so the encoder stays as it is. `init` is the
converted checkpoint (tools/convert.py); tools/export_vae.py makes a file of the run for another conversion.
The videos: `python tools/prepare_data.py videos/ --out shards_pixels --pixels 33 --shard-records 32 --model
Wan2.2-S2V-14B-jax`. A GPU of 80 GB has room for one crop: fewer than 8 take `--train.accumulate` (`--plan`).
"""

from lavatar_jax.config import VAEConfig
from lavatar_jax.data.clips import ClipsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.vae import VAELossConfig, VAERun


def get_config() -> VAERun:
    return VAERun(
        out="runs/wan14b_vae",
        init="Wan2.2-S2V-14B-jax",
        model=VAEConfig(latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16),
        data=ClipsConfig(folder="shards_pixels", clips=0, crop_size=256, crop_frames=17, full_share=0.0),
        loss=VAELossConfig(decoder_only=True),
        train=LoopConfig(steps=10_000, learning_rate=2e-5, batch=8, ema_decay=0.999, checkpoint_seconds=1800),
        optim=OptimConfig(kind="adamw"),
    )
