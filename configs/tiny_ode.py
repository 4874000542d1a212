"""Optional, between stages 1 and 2 of the small model: a student that follows its teacher's paths.

Then `python train.py configs/tiny_distill.py --init runs/ode --teacher runs/dit_long`.
"""

from configs.tiny_dit import MODEL, SAMPLING
from lavatar_jax.training.distill_step import DistillConfig
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.ode_init import OdeRun
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.scores import ScoreConfig
from lavatar_jax.training.self_forcing import SelfForcingConfig


def get_config() -> OdeRun:
    return OdeRun(
        init="runs/dit_long",
        model=MODEL,
        data=LatentsConfig(),
        samples=SamplesConfig(records=3),
        sampling=SAMPLING,
        rollout=SelfForcingConfig(),
        score=ScoreConfig(kind="causal", without_audio="other", without_text="keep"),
        loss=DMDConfig(shift=3.0, guidance=0.1),  # as stage 2's
        dyna=DynaConfig(),
        distill=DistillConfig(),
        train=LoopConfig(seconds=900, learning_rate=5e-4, batch=4, ema_decay=0.98, checkpoint_seconds=180),
    )
