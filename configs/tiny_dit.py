"""Stage 1 of the small model: diffusion forcing on encoded talking faces, 4 blocks of 12 frames a clip."""

from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.inference.denoise import schedule
from lavatar_jax.models.logmel import LogMelConfig
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.samples import SamplesConfig

MODEL = DiTConfig(
    layers=5,
    width=288,
    heads=9,
    ffn_width=864,
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
)

# How the small model is sampled: no motion frames; the sink keeps one distance, in the range of its training;
# the video starts right after one still picture, as its training clips do. The sink stays the photo: what the
# adaptive sink puts in its place, the model's own first latent, is less clean (docs/ablation.md: colour error
# 4.9 against 2.6).
# All four steps have work to do: with the released schedule the last one would begin at noise level 0.009.
SAMPLING = SamplingConfig(
    motion=False,
    adapt_sink_after=None,
    sink_distance=24,
    prime_latents=1,
    drop_first_frames=0,
    doubly_shifted=False,
)


def get_config() -> DiTRun:
    return DiTRun(
        model=MODEL,
        data=LatentsConfig(clips=2400),
        samples=SamplesConfig(records=3),
        sampling=SAMPLING,
        loss=ForcingConfig(
            audio_dropout=0.05,
            sink_dropout=0.05,
            mouth_weight=6.0,
            sampled_clips=0.6,
            sampled_levels=tuple(schedule(SAMPLING).sigmas[:-1].tolist()),
        ),
        unroll=True,
        train=LoopConfig(
            seconds=6500,
            learning_rate=2e-3,
            batch=8,
            ema_decay=0.995,
            precision="operands",
            checkpoint_seconds=180,
        ),
    )
