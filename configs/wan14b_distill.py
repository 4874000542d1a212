"""Stage 2 at full size: a 4-step student of Wan2.2-S2V-14B, by adapters on one set of weights.

Method section 4: student 1e-5, fake score 2e-6, five critic steps a student step, 500 steps of the student.
There one clip is on each of 128 devices. The four rings of a clip alone take 48 GB, so here two devices of
80 GB share a clip (`--plan`): batches of 64 on 128 devices, or in parts (`--train.accumulate`) on fewer.
`init` is the converted checkpoint: the bidirectional teacher, on which the student (`lora.init`: stage 1's
adapters) and the fake score are adapters. Motion frames are gone. The rollout has the levels, ring and sink
of the sampler, and new noise between the steps. Guidance leads away from silence and the negative prompt that
`tools/prepare_data.py` encoded: the published weights were not trained on empty text states.
"""

from configs.wan14b_forcing import DATA, MODEL
from lavatar_jax.checkpoints.runs import CheckpointConfig
from lavatar_jax.config import PAPER
from lavatar_jax.parallel import MeshConfig
from lavatar_jax.training.distill import DistillRun
from lavatar_jax.training.distill_step import DistillConfig
from lavatar_jax.training.dmd import DMDConfig
from lavatar_jax.training.dynaforcing import DynaConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.scores import ScoreConfig
from lavatar_jax.training.self_forcing import SelfForcingConfig
from lavatar_jax.training.weights import LoraConfig


def get_config() -> DistillRun:
    return DistillRun(
        out="runs/wan14b_distill",
        init="Wan2.2-S2V-14B-jax",
        model=MODEL,
        clip=(21, 90, 50),
        data=DATA,
        sampling=PAPER,
        # The released schedule's last step starts at noise level 0.009: it has nothing to learn, and a
        # rollout that is left before it shows the critic the same clip.
        rollout=SelfForcingConfig(
            transition="renoise", shift=5.0, grad_frames=21, exit_weights=(1.0, 1.0, 1.0, 0.0)
        ),
        score=ScoreConfig(kind="bidirectional", without_audio="zeros", without_text="negative"),
        loss=DMDConfig(shift=5.0, guidance=3.0),
        dyna=DynaConfig(),
        distill=DistillConfig(critic_rate=2e-6, update_ratio=5),
        lora=LoraConfig(rank=128, alpha=64.0, base="bfloat16", init="runs/wan14b_forcing"),
        train=LoopConfig(
            steps=2_500,
            learning_rate=1e-5,
            warmup=0.0,
            weight_decay=0.01,
            batch=64,
            ema_decay=0.99,
            precision="bfloat16",
            remat="full",
            workers=4,
            checkpoint_seconds=1800,
        ),
        optim=OptimConfig(kind="adamw", betas=(0.0, 0.999), clip=10.0, schedule="constant"),
        critic_optim=OptimConfig(kind="adamw", betas=(0.0, 0.999), clip=10.0, schedule="constant"),
        mesh=MeshConfig(fsdp=4, tensor=2),
        checkpoint=CheckpointConfig(keep=3, every=250),
    )
