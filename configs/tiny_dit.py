"""Stage 1 of the small model: diffusion forcing on encoded talking faces, 4 blocks of 12 frames a clip."""

from lavatar_jax.config import DiTConfig
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig


def get_config() -> DiTRun:
    return DiTRun(
        model=DiTConfig(
            layers=6,
            width=224,
            heads=7,
            ffn_width=672,
            latent_channels=16,
            patch=4,
            text_dim=64,
            text_len=16,
            audio_dim=LogMelConfig().dim,
            audio_layers=1,
            inject_layers=(0, 2, 4),
            motion_frames=(0, 0),
            use_motion=False,
            use_pose=False,
            input_skip=True,
        ),
        data=LatentsConfig(),
        loss=ForcingConfig(),
        train=LoopConfig(seconds=3600, learning_rate=1e-3, batch=8, ema_decay=0.995, checkpoint_seconds=180),
    )
