"""Stage 1 at full size: diffusion forcing of Wan2.2-S2V-14B by adapters, 84 frames of 720 x 400 pixels.

Method section 4: rank 128, alpha 64, one clip on each of 128 devices, 25,000 steps. The published VAE
stays as it is: stage 0 (wan14b_vae.py) is for those who want another decoder. `init` is the converted
checkpoint (tools/convert.py), `data.folder` holds shards of tools/prepare_data.py, whose clips have that area
(704 x 384, 384 x 704 or 512 x 512; `clip` is the size that a plan counts). On fewer devices:
`--train.accumulate`, `--mesh.fsdp`; see `--plan`.
"""

from lavatar_jax.checkpoints.runs import CheckpointConfig
from lavatar_jax.config import DiTConfig
from lavatar_jax.parallel import MeshConfig
from lavatar_jax.training.diffusion_forcing import DiTRun, ForcingConfig
from lavatar_jax.training.latents import LatentsConfig
from lavatar_jax.training.loop import LoopConfig
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.weights import LoraConfig

MODEL = DiTConfig(attention="chunked")
DATA = LatentsConfig(
    folder="shards",
    vae="Wan2.2-S2V-14B-jax",  # for samples, where they are asked for
    clips=0,
    text_len=MODEL.text_len,
    text_dim=MODEL.text_dim,
)


def get_config() -> DiTRun:
    return DiTRun(
        out="runs/wan14b_forcing",
        init="Wan2.2-S2V-14B-jax",
        model=MODEL,
        clip=(21, 90, 50),
        data=DATA,
        # Every block has a noise level of its own, as in the paper; the mixture of the small model is not for
        # one that has time to see all combinations.
        loss=ForcingConfig(audio_dropout=0.15, mouth_weight=1.0, same_level_clips=0.0, clean_clips=0.0),
        lora=LoraConfig(rank=128, alpha=64.0, base="bfloat16"),
        samples=SamplesConfig(records=8, every=0.0),  # measured; to stream them takes 48 GB on a device
        train=LoopConfig(
            steps=25_000,
            learning_rate=1e-5,
            warmup=0.02,
            batch=128,
            ema_decay=0.999,
            precision="bfloat16",
            remat="full",
            workers=4,
            checkpoint_seconds=1800,
        ),
        optim=OptimConfig(kind="adamw", betas=(0.9, 0.999), schedule="constant"),
        mesh=MeshConfig(fsdp=8),
        checkpoint=CheckpointConfig(keep=3, every=2_500),
    )
