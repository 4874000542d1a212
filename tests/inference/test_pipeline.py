"""The pipeline against the sequential rollout, which is its oracle."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lavatar_jax.checkpoints.store import load_model_folder
from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.generate import SAMPLES
from lavatar_jax.inference.images import load_image
from lavatar_jax.inference.pipeline import Feed, Pipeline
from lavatar_jax.inference.pipeline_rollout import pipeline_rollout
from lavatar_jax.inference.pipeline_spmd import OneProgramPipeline
from lavatar_jax.inference.rollout import Draws, rollout
from lavatar_jax.inference.talk import photo_conditions, talk
from lavatar_jax.lora import add_adapters
from lavatar_jax.parallel import PipelineLayout, place_model, stage_mesh
from lavatar_jax.quant import E4M3, quantize
from lavatar_jax.types import BlockInput, Conditions
from tests.tiny import normal, random_dit, random_vae, tiny_config, tiny_vae_config

SAMPLING = SamplingConfig(motion=False, adapt_sink_after=None, prime_latents=2, ring_blocks=3)
HEIGHT = WIDTH = 4
VAE = tiny_vae_config()


def conditions(seed: int, config=None) -> Conditions:
    config = config or tiny_config()
    return Conditions(
        text=normal(seed, 1, config.text_len, config.text_dim),
        reference=normal(seed + 1, 1, 1, HEIGHT, WIDTH, 3),
        motion=None,
        still=normal(seed + 2, 1, 2, HEIGHT, WIDTH, 3),
    )


def audio(seed: int, blocks: int) -> list[BlockInput]:
    return [BlockInput(normal(1000 * seed + i, 1, 1, 2, 5, 12)) for i in range(blocks)]


def sequential(sampling: SamplingConfig, blocks: int, seed: int = 3, config=None):
    config = config or tiny_config()
    made = rollout(
        random_dit(config),
        random_vae(VAE),
        conditions(seed, config),
        audio(seed, blocks),
        sampling,
        seed=seed,
    )
    return [(np.asarray(b.latent), np.asarray(b.frames)) for b in made]


def piped(
    sampling: SamplingConfig, blocks: int, layout: PipelineLayout, *, seed: int = 3, drain=True, kind=Pipeline
):
    pipeline = kind(
        random_dit(tiny_config()), random_vae(VAE), sampling, height=HEIGHT, width=WIDTH, layout=layout
    )
    made = pipeline_rollout(pipeline, conditions(seed), audio(seed, blocks), seed=seed, drain_for_sink=drain)
    return [(np.asarray(b.latent), np.asarray(b.frames)) for b in made]


def assert_equal(got, want):
    assert len(got) == len(want)
    for (latent, frames), (want_latent, want_frames) in zip(got, want, strict=True):
        np.testing.assert_allclose(latent, want_latent, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(frames, want_frames, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "layout"),
    [
        (4, PipelineLayout(stages=4)),
        (4, PipelineLayout(stages=4, own_decoder=False)),
        (4, PipelineLayout(stages=2)),
        (4, PipelineLayout(stages=1, own_decoder=False)),
        (2, PipelineLayout(stages=2)),
        (3, PipelineLayout(stages=3)),
        (8, PipelineLayout(stages=8)),
        (4, PipelineLayout(stages=4, tensor=2)),
    ],
    ids=lambda value: (
        str(value) if isinstance(value, int) else f"{value.stages}x{value.tensor}+{value.own_decoder:d}"
    ),
)
def test_equals_the_sequential_rollout(steps: int, layout: PipelineLayout) -> None:
    """20 blocks: warm-up, steady state, and a ring of 3 blocks that wraps many times."""
    sampling = dataclasses.replace(SAMPLING, steps=steps)
    assert_equal(piped(sampling, 20, layout), sequential(sampling, 20))


@pytest.mark.parametrize("per_channel", [False, True])
def test_8_bit_weights_on_tensor_parallel_stages(per_channel: bool) -> None:
    dit, vae = quantize(random_dit(tiny_config()), per_channel=per_channel), random_vae(VAE)
    layout = PipelineLayout(stages=4, tensor=2)
    pipeline = Pipeline(dit, vae, SAMPLING, height=HEIGHT, width=WIDTH, layout=layout)
    weight = pipeline.dit.blocks.self_attn.q.weight.get_value()
    assert weight.values.dtype == E4M3
    assert 2 * weight.values.addressable_shards[0].data.shape[-1] == weight.values.shape[-1]
    got = pipeline_rollout(pipeline, conditions(3), audio(3, 6), seed=3)
    want = rollout(dit, vae, conditions(3), audio(3, 6), SAMPLING, seed=3)
    for block, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(block.latent, reference.latent, atol=1e-5)


@pytest.mark.parametrize("adapt", [1, 2, 5])
def test_adaptive_sink_with_a_drain(adapt: int) -> None:
    sampling = dataclasses.replace(SAMPLING, adapt_sink_after=adapt)
    assert_equal(piped(sampling, 9, PipelineLayout()), sequential(sampling, 9))


def test_adaptive_sink_without_a_drain_is_one_that_adapts_later() -> None:
    early = dataclasses.replace(SAMPLING, adapt_sink_after=1)
    late = dataclasses.replace(SAMPLING, adapt_sink_after=4)
    got = piped(early, 9, PipelineLayout(), drain=False)
    assert_equal(got, sequential(late, 9))
    assert not np.allclose(got[2][0], sequential(early, 9)[2][0], atol=1e-4)  # here early has adapted


@pytest.mark.parametrize("drain", [True, False])
def test_one_program_for_all_devices_is_the_same(drain: bool) -> None:
    """The decoder as fifth stage of the same program; without a drain the sink comes one tick later."""
    sampling = dataclasses.replace(SAMPLING, adapt_sink_after=1)
    got = piped(sampling, 20, PipelineLayout(), drain=drain, kind=OneProgramPipeline)
    assert_equal(got, sequential(dataclasses.replace(sampling, adapt_sink_after=1 if drain else 5), 20))


@pytest.mark.parametrize("kind", [Pipeline, OneProgramPipeline])
def test_devices_of_several_processes_are_refused(kind) -> None:
    @dataclasses.dataclass(frozen=True)
    class Device:
        process_index: int

    devices = [Device(0), Device(0), Device(1), Device(1), Device(1)]
    size = {"height": HEIGHT, "width": WIDTH}
    with pytest.raises(ValueError, match="one process so far"):
        kind(random_dit(tiny_config()), random_vae(VAE), SAMPLING, devices=devices, **size)


def test_motion_frames_poses_and_two_speakers() -> None:
    """Everything a packet and a sink can carry."""
    config = tiny_config(use_motion=True, use_pose=True)
    sampling = dataclasses.replace(SAMPLING, motion=True, adapt_sink_after=2)
    size, vae = 8, random_vae(VAE)
    given = Conditions(
        text=normal(1, 1, config.text_len, config.text_dim),
        reference=normal(2, 1, 1, size, size, 3),
        motion=normal(3, 1, 19, size, size, 3),
        still=normal(4, 1, 2, size, size, 3),
        actor_mask=jax.numpy.round(jax.nn.sigmoid(normal(5, 1, 2, 3, size // 2, size // 2))),
    )
    blocks = [
        BlockInput(normal(50 + i, 1, 2, 2, 5, 12), normal(70 + i, 1, 3, size, size, 3)) for i in range(6)
    ]
    dit = random_dit(config)
    want = list(rollout(dit, vae, given, blocks, sampling, seed=1))
    pipeline = Pipeline(dit, vae, sampling, height=size, width=size, speakers=2)
    got = list(pipeline_rollout(pipeline, given, blocks, seed=1))
    assert [b.index for b in got] == list(range(6))
    for block, reference in zip(got, want, strict=True):
        np.testing.assert_allclose(block.latent, reference.latent, atol=1e-5)


def make_pipeline(slots: int = 1, sampling: SamplingConfig = SAMPLING, **options) -> Pipeline:
    return Pipeline(
        random_dit(tiny_config()),
        random_vae(VAE),
        sampling,
        height=HEIGHT,
        width=WIDTH,
        slots=slots,
        **options,
    )


class Video:
    """One session's part of a shared pipeline: feeds its own blocks, keeps what comes out."""

    def __init__(self, pipeline: Pipeline, slot: int, seed: int, blocks: int) -> None:
        self.pipeline, self.slot = pipeline, slot
        self.inputs = audio(seed, blocks)
        self.draws = Draws(pipeline.sampling, (1, 3, HEIGHT, WIDTH, 3), seed)
        self.fed = 0
        self.frames: list[np.ndarray] = []
        pipeline.open(slot, conditions(seed))

    def feed(self) -> dict[int, Feed]:
        if self.fed == len(self.inputs):
            return {}
        index, self.fed = self.fed, self.fed + 1
        return {
            self.slot: Feed(index, self.draws.noise(index), self.inputs[index], self.draws.distances(index))
        }


def play(pipeline: Pipeline, ticks: int, videos: dict[int, Video], plan) -> None:
    """`plan(tick)` says which slots feed in a tick; empty: all."""
    for tick in range(ticks):
        feeds: dict[int, Feed] = {}
        for slot, video in videos.items():
            if plan is None or slot in plan(tick):
                feeds |= video.feed()
        for block in pipeline.tick(feeds):
            assert block.index == len(videos[block.slot].frames)
            videos[block.slot].frames.append(np.asarray(pipeline.decode(block)))


def test_videos_that_share_a_pipeline_do_not_disturb_each_other() -> None:
    """Joining, pausing and leaving: every video is bit for bit what it is with the other slots empty."""
    alone = {}
    for slot, seed in ((0, 10), (1, 20), (2, 30)):
        pipeline = make_pipeline(slots=3)
        alone[seed] = Video(pipeline, slot, seed, 7)
        play(pipeline, 12, {slot: alone[seed]}, None)
    shared = make_pipeline(slots=3)
    videos = {0: Video(shared, 0, 10, 7)}
    play(shared, 3, videos, None)
    videos[1] = Video(shared, 1, 20, 7)  # joins while the first is at block 3
    play(shared, 5, videos, lambda tick: {0} if tick % 2 else {0, 1})  # and pauses now and then
    videos[2] = Video(shared, 2, 30, 7)
    play(shared, 25, videos, None)
    for slot, seed in ((0, 10), (1, 20), (2, 30)):
        assert len(videos[slot].frames) == 7
        for got, want in zip(videos[slot].frames, alone[seed].frames, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_slot_can_be_used_again() -> None:
    pipeline = make_pipeline()
    first = Video(pipeline, 0, 10, 6)
    play(pipeline, 10, {0: first}, None)
    again = Video(pipeline, 0, 10, 6)
    play(pipeline, 10, {0: again}, None)
    for got, want in zip(again.frames, first.frames, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_slots_next_video_has_neither_the_masks_nor_the_prompt_of_the_last() -> None:
    def frames(pipeline: Pipeline, given: Conditions) -> list[np.ndarray]:
        draws, got = Draws(SAMPLING, (1, 3, HEIGHT, WIDTH, 3), 1), []
        pipeline.open(0, given)
        for tick in range(12):
            inputs = BlockInput(normal(tick, 1, 2, 2, 5, 12))
            feeds = {0: Feed(tick, draws.noise(tick), inputs, draws.distances(tick))} if tick < 4 else {}
            got += [np.asarray(pipeline.decode(block)) for block in pipeline.tick(feeds)]
        return got

    config = tiny_config()
    plain = conditions(1)
    short = dataclasses.replace(plain, text=plain.text[:, : config.text_len - 1])
    whole = dataclasses.replace(plain, text=plain.text.at[:, config.text_len - 1 :].set(0.0))
    mask = np.zeros((1, 2, 3, HEIGHT // 2, WIDTH // 2), np.float32)
    mask[:, 0] = 1.0
    pipeline = make_pipeline(speakers=2)
    masked = frames(pipeline, dataclasses.replace(plain, actor_mask=mask))
    again, fresh = frames(pipeline, short), frames(make_pipeline(speakers=2), whole)
    assert len(fresh) == 4
    for got, want in zip(again, fresh, strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.abs(masked[-1] - fresh[-1]).max() > 1e-3


def test_conditions_that_do_not_fit_are_refused() -> None:
    plain, mask = conditions(1), np.zeros((1, 1, 3, HEIGHT // 2, WIDTH // 2), np.float32)
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="one speaker takes no mask"):
        pipeline.open(0, dataclasses.replace(plain, actor_mask=mask))
    with pytest.raises(ValueError, match=r"a mask of \[2, 3, 2, 2\]"):
        pipeline.open(0, dataclasses.replace(plain, actor_mask=mask.repeat(2, axis=1)))
    with pytest.raises(ValueError, match="the model takes"):
        pipeline.open(0, dataclasses.replace(plain, text=plain.text.repeat(2, axis=1)))


def test_a_block_out_of_order_is_refused() -> None:
    pipeline = make_pipeline()
    video = Video(pipeline, 0, 1, 2)
    feed = video.feed()
    pipeline.tick(feed)
    with pytest.raises(ValueError, match="slot 0 expects block 1, not 0"):
        pipeline.tick(feed)


@pytest.mark.parametrize("layout", [PipelineLayout(), PipelineLayout(stages=4, tensor=2)], ids=["4", "4x2"])
def test_one_program_for_all_ticks(layout: PipelineLayout) -> None:
    pipeline = make_pipeline(layout=layout)
    play(pipeline, 9, {0: Video(pipeline, 0, 1, 5)}, None)
    assert pipeline._tick._cache_size() == 1


def test_the_tick_copies_no_ring() -> None:
    """Rings are donated and updated in place: at real size a copy would not fit."""
    pipeline = make_pipeline(slots=2)
    compiled = pipeline.lower_tick().compile()
    assert full_copies(compiled.as_text(), local_shape(pipeline.rings[0].k, pipeline)) == []


def local_shape(array: jax.Array, pipeline: Pipeline) -> tuple[int, ...]:
    return array.sharding.shard_shape(array.shape)


def full_copies(hlo: str, shape: tuple[int, ...]) -> list[str]:
    wanted = f"f32[{','.join(map(str, shape))}]"
    pattern = rf"= {re.escape(wanted)}\S* copy(-start)?\("
    return [line.strip() for line in hlo.splitlines() if re.search(pattern, line)]


def test_every_stage_holds_its_own_rings_only() -> None:
    pipeline = make_pipeline()
    stages = pipeline.layout.stages
    for leaf in jax.tree.leaves(pipeline.rings):
        assert len({shard.device for shard in leaf.addressable_shards}) == stages
        assert leaf.addressable_shards[0].data.shape[0] * stages == leaf.shape[0]


def test_tensor_parallel_stages_hold_half_of_each_matrix() -> None:
    pipeline = make_pipeline(layout=PipelineLayout(stages=4, tensor=2))
    blocks = pipeline.dit.blocks
    for weight, axis in (
        (blocks.self_attn.q.weight, -1), (blocks.self_attn.o.weight, -2),
        (blocks.ffn.inner.weight, -1), (blocks.ffn.outer.weight, -2),
    ):  # fmt: skip
        local = weight[...].addressable_shards[0].data.shape
        assert 2 * local[axis] == weight[...].shape[axis]
    heads = pipeline.rings[0].k
    assert 2 * heads.addressable_shards[0].data.shape[3] == heads.shape[3]


def test_tensor_parallel_stages_keep_the_rank_of_adapters_whole() -> None:
    """A rank of 3 could not be split over 2 devices."""
    adapted = add_adapters(random_dit(tiny_config()), jax.random.key(0), rank=3, alpha=3.0)
    mesh = stage_mesh(PipelineLayout(stages=1, tensor=2, own_decoder=False), jax.devices()[:2])
    placed = place_model(adapted, mesh)
    q, o = (getattr(placed.blocks.self_attn, name).weight.get_value() for name in "qo")
    local = [x.sharding.shard_shape(x.shape) for x in (q.a, q.b, o.a, o.b)]
    width = tiny_config().width
    assert [shape[-2:] for shape in local] == [(width, 3), (3, width // 2), (width // 2, 3), (3, width)]


@pytest.mark.parametrize(
    "changes", [{"history": "clean"}, {"decode": "clip"}, {"steps": 3}], ids=lambda c: next(iter(c))
)
def test_refuses_what_a_pipeline_cannot_do(changes) -> None:
    with pytest.raises(ValueError, match=r"history|decode|steps"):
        make_pipeline(sampling=dataclasses.replace(SAMPLING, **changes), layout=PipelineLayout())


@pytest.mark.parametrize("layout", [PipelineLayout(), PipelineLayout(stages=2), PipelineLayout(stages=1)])
def test_a_saved_video_goes_on_as_if_nothing_had_happened(layout: PipelineLayout) -> None:
    """Saved in one pipeline and restored in another, into a busy slot: bit for bit the same frames."""
    whole = Video(make_pipeline(slots=2, layout=layout), 0, 10, 10)
    play(whole.pipeline, 14, {0: whole}, None)
    begun = Video(make_pipeline(slots=2, layout=layout), 0, 10, 10)
    play(begun.pipeline, 9, {0: begun}, lambda tick: {0} if tick < 5 else set())
    state = begun.pipeline.save(0)
    other = make_pipeline(slots=2, layout=layout)
    previous = Video(other, 0, 99, 5)  # what was in the slot before, and is still in flight
    play(other, 2, {0: previous}, None)
    other.load(0, state)
    begun.pipeline = other
    play(other, 12, {0: begun}, None)
    assert len(begun.frames) == 10
    for got, want in zip(begun.frames, whole.frames, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_saved_video_can_change_its_layout() -> None:
    whole = Video(make_pipeline(), 0, 10, 8)
    play(whole.pipeline, 12, {0: whole}, None)
    begun = Video(make_pipeline(), 0, 10, 8)
    play(begun.pipeline, 8, {0: begun}, lambda tick: {0} if tick < 4 else set())
    other = make_pipeline(layout=PipelineLayout(stages=1, own_decoder=False))
    other.load(0, begun.pipeline.save(0))
    begun.pipeline = other
    play(other, 5, {0: begun}, None)
    assert len(begun.frames) == 8
    np.testing.assert_allclose(begun.frames[-1], whole.frames[-1], atol=1e-5)


def test_a_video_in_flight_cannot_be_saved() -> None:
    pipeline = make_pipeline()
    pipeline.tick(Video(pipeline, 0, 1, 2).feed())
    with pytest.raises(ValueError, match="in flight"):
        pipeline.save(0)


def test_a_closed_video_does_not_come_out() -> None:
    pipeline = make_pipeline()
    pipeline.tick(Video(pipeline, 0, 1, 2).feed())
    pipeline.close(0)
    assert [pipeline.tick() for _ in range(5)] == [[]] * 5


def test_an_early_block_comes_out_sooner_and_changes_nothing_else() -> None:
    plain = Video(make_pipeline(), 0, 10, 6)
    play(plain.pipeline, 10, {0: plain}, None)
    pipeline = make_pipeline()
    video = Video(pipeline, 0, 10, 6)
    first = dataclasses.replace(video.feed()[0], exit_stage=1)
    finished = [pipeline.tick({0: first})]
    finished += [pipeline.tick(video.feed()) for _ in range(9)]
    came_out = [(tick, block.index, block.early) for tick, blocks in enumerate(finished) for block in blocks]
    assert came_out == [(1, 0, True), *((3 + i, i, False) for i in range(6))]
    early, final = finished[1][0], finished[3][0]
    assert early.latent.shape == final.latent.shape
    assert np.abs(np.asarray(early.latent) - np.asarray(final.latent)).mean() > 1e-3
    latents = [np.asarray(block.latent) for blocks in finished for block in blocks if not block.early]
    frames = [
        np.asarray(pipeline.decode(block)) for blocks in finished for block in blocks if not block.early
    ]
    assert np.isfinite(latents[0]).all()
    for got, want in zip(frames, plain.frames, strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_shipped_model_says_the_same_on_five_devices() -> None:
    avatar = load_model_folder("tiny")
    photo = load_image(SAMPLES / "face.png")
    given = photo_conditions(avatar, photo, "a person talking")
    sound = 0.1 * np.random.default_rng(0).normal(size=16_000).astype(np.float32)
    one = np.concatenate(list(talk(avatar, given, sound)))
    five = np.concatenate(list(talk(avatar, given, sound, layout=PipelineLayout())))
    assert one.shape == five.shape
    assert np.abs(one.astype(int) - five).max() <= 1  # rounding
