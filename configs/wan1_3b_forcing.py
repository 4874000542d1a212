"""Stage 1 at the width of Wan2.1's 1.3B model, all weights, one clip at a time: for `tools/bench_train.py`.

The largest published size of which all weights can be trained on one card; in stage 2 with shorter or
smaller clips (`--clip 12 44 24`). There are no S2V weights of this size, so it is no recipe: what comes out
of it has never been looked at.
"""

import dataclasses

from configs.wan14b_forcing import get_config as at_14b
from lavatar_jax.evaluation.capacity import dit_for
from lavatar_jax.parallel import MeshConfig
from lavatar_jax.training.diffusion_forcing import DiTRun
from lavatar_jax.training.weights import LoraConfig

MODEL = dataclasses.replace(dit_for(1.3e9), attention="chunked")


def get_config() -> DiTRun:
    run = at_14b()
    return dataclasses.replace(
        run,
        out="runs/wan1_3b_forcing",
        init=None,
        model=MODEL,
        lora=LoraConfig(),
        train=dataclasses.replace(run.train, batch=1),
        mesh=MeshConfig(),
    )
