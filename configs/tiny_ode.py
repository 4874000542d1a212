"""Optional, between stages 1 and 2 of the small model: a student that follows its teacher's paths."""

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.training.distill_step import DistillConfig
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.ode_init import OdeRun
from lavatar_jax.training.scores import ScoreConfig
from lavatar_jax.training.self_forcing import SelfForcingConfig


def get_config() -> OdeRun:
    return OdeRun(
        init="runs/dit",
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
        # As tools/package_model.py samples the small model.
        sampling=SamplingConfig(
            motion=False, adapt_sink_after=None, sink_distance=24, prime_latents=1, drop_first_frames=0
        ),
        rollout=SelfForcingConfig(),
        score=ScoreConfig(kind="causal", without_audio="other", without_text="keep"),
        loss=DMDConfig(shift=3.0, guidance=0.5),
        dyna=DynaConfig(),
        distill=DistillConfig(),
        train=LoopConfig(seconds=900, learning_rate=5e-4, batch=4, ema_decay=0.98, checkpoint_seconds=180),
    )
