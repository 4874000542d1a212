"""One video through the pipeline, block after block, as `rollout` makes it on one device."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

from jaxtyping import Array, Float

from lavatar_jax.inference.pipeline import Feed, Finished, Pipeline
from lavatar_jax.inference.rollout import Draws
from lavatar_jax.types import BlockInput, Conditions


@dataclasses.dataclass(frozen=True)
class PipelinedBlock:
    """What one step yields: as `rollout.Block`, without the velocities and rings of inner steps."""

    index: int
    latent: Float[Array, "B F H W C"]
    frames: Float[Array, "B T H W 3"]


def pipeline_rollout(
    pipeline: Pipeline,
    conditions: Conditions,
    blocks: Iterable[BlockInput],
    *,
    seed: int = 0,
    draws: Draws | None = None,
    slot: int = 0,
    drain_for_sink: bool = True,
) -> Iterator[PipelinedBlock]:
    """Feed `blocks` to a slot as fast as the pipeline takes them; yield them in order.

    The adaptive sink is block 0's own latent, which the first stage needs before block `adapt_sink_after`
    enters. With fewer blocks than stages in between it is not there yet: `drain_for_sink` waits for it, as
    the paper does (same numbers as the sequential rollout); without, blocks see the old sink until then
    (same numbers as a rollout with `adapt_sink_after` = number of stages).
    """
    sampling, stages = pipeline.sampling, pipeline.stages
    config = pipeline.config
    shape = (1, config.block_frames, pipeline.height, pipeline.width, config.latent_channels)
    draws = draws or Draws(sampling, shape, seed)
    adapt_at = sampling.adapt_sink_after
    if adapt_at is not None and not drain_for_sink:
        adapt_at = max(adapt_at, stages)
    pipeline.open(slot, conditions)
    adapted: Array | None = None
    ready: deque[PipelinedBlock] = deque()

    def collect(finished: list[Finished]) -> None:
        nonlocal adapted
        for block in finished:
            if block.index == 0:
                adapted = block.latent[:, :1]
            ready.append(PipelinedBlock(block.index, block.latent, pipeline.decode(block)))

    for index, inputs in enumerate(blocks):
        if index == adapt_at:
            while adapted is None:
                collect(pipeline.tick())
            pipeline.set_sink(slot, adapted, conditions.motion)
        feed = Feed(index, draws.noise(index), inputs, draws.distances(index))
        collect(pipeline.tick({slot: feed}))
        while len(ready) > 1:  # one block stays behind, so that devices work while its frames are used
            yield ready.popleft()
    while pipeline.busy:
        collect(pipeline.tick())
    yield from ready
