"""Stage 2 of the small model: its stage 1, at one noise level, is the teacher of a student of four steps."""

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.training.distill import DistillRun
from lavatar_jax.training.distill_step import DistillConfig
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.scores import ScoreConfig
from lavatar_jax.training.self_forcing import SelfForcingConfig


def get_config() -> DistillRun:
    return DistillRun(
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
        # The sampler's last step starts at noise level 0.009: a student that leaves there learns nothing.
        rollout=SelfForcingConfig(transition="euler", shift=3.0, exit_weights=(1.0, 1.0, 1.0, 0.0)),
        score=ScoreConfig(kind="causal", without_audio="other", without_text="keep"),
        loss=DMDConfig(shift=3.0, guidance=0.5),
        # Lip-sync holds on to real clips: some samples start from noised ones, and are pulled towards them.
        dyna=DynaConfig(hybrid=0.3),
        distill=DistillConfig(
            critic_rate=5e-4, update_ratio=5, critic_warmup=20, mouth_weight=3.0, regression=0.3, run_in=3
        ),
        # Muon would take as long as the critic's whole forward and backward pass, on such small batches.
        critic_optim=OptimConfig(kind="adamw"),
        train=LoopConfig(
            seconds=2100, learning_rate=3e-4, batch=4, ema_decay=0.97, log_every=20, checkpoint_seconds=180
        ),
    )
