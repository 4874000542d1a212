"""Stage 2 at the width of Wan2.1's 1.3B model, three networks of all weights: for `tools/bench_train.py`."""

import dataclasses

from configs.wan1_3b_forcing import MODEL
from configs.wan14b_distill import get_config as at_14b
from lavatar_jax.parallel import MeshConfig
from lavatar_jax.training.distill import DistillRun
from lavatar_jax.training.weights import LoraConfig


def get_config() -> DistillRun:
    run = at_14b()
    return dataclasses.replace(
        run,
        out="runs/wan1_3b_distill",
        init=None,
        model=MODEL,
        lora=LoraConfig(),
        train=dataclasses.replace(run.train, batch=1),
        mesh=MeshConfig(),
    )
