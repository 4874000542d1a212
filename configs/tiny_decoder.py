"""After stage 2 of the small model: its decoder learns to draw what its transformer predicts."""

from configs.tiny_dit import SAMPLING
from configs.tiny_vae import MODEL
from lavatar_jax.training.decoder import DecoderRun, PredictionsConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.vae import VAELossConfig


def get_config() -> DecoderRun:
    return DecoderRun(
        model=MODEL,
        data=LatentsConfig(clips=2400),
        samples=SamplesConfig(records=3),
        predictions=PredictionsConfig(),
        sampling=SAMPLING,
        loss=VAELossConfig(square=8.0, texture=1.0),
        train=LoopConfig(seconds=1500, learning_rate=2e-3, batch=8, ema_decay=0.99, checkpoint_seconds=120),
    )
