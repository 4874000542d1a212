"""Cases 01-05 and 06e: rope, embeddings, audio encoder, motion packer, one block, actor masks."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from lavatar_jax.checkpoints.convert import convert
from lavatar_jax.checkpoints.tables_dit import DIT_RULES
from lavatar_jax.config import DiTConfig
from lavatar_jax.inference.actor_masks import build_actor_masks, dilate, route
from lavatar_jax.models import rope as rp
from lavatar_jax.models.attention import KV, dot_product_attention, init_cache, ring_attention, ring_slot
from lavatar_jax.models.audio_encoder import CausalAudioEncoder, encode_audio
from lavatar_jax.models.dit import Block, CausalDiT, Sequence, timestep_sinusoid
from lavatar_jax.models.dit_forward import write_sink
from lavatar_jax.models.layers import MLP, Linear, gelu_tanh
from lavatar_jax.models.motion_packer import MotionPacker
from tools.parity.case import EXACT, Case, Check, dit_config, last, load_part, pad_text


def rope(case: Case) -> Iterator[Check]:
    tolerance = case.tolerance("outputs")
    head_dim = case["head_dim"]
    for variant, want in case.outputs():
        half = variant == "ropefp16"
        # Rows of the reference's table: one token at (n, n, n).
        rows = [rp.Grid((n, n, n), (n + 1, n + 1, n + 1), (1, 1, 1)) for n in case["table_rows"]]
        table = rp.rope(rows, head_dim)  # its own dump of the table is not rounded in either variant
        yield Check("table.cos", table.cos, want["table.cos"], tolerance, variant)
        yield Check("table.sin", table.sin, want["table.sin"], tolerance, variant)
        for name, entry in case["sets"].items():
            grids = [rp.Grid(*map(tuple, group)) for group in entry["groups"]]
            grids = [grid.rolled(entry["n_frames"]) if i < 2 else grid for i, grid in enumerate(grids)]
            table = rp.rope(grids, head_dim, half_table=half)
            rotated = rp.apply_rope(jnp.asarray(case.inputs[f"{name}.x"]), table)
            got = {"freq_cos": table.cos, "freq_sin": table.sin, "rotated": rotated}
            for part, value in got.items():
                yield Check(f"{name}.{part}", value, want[f"{name}.{part}"], tolerance, variant)


class _Embeddings(nnx.Module):
    """The part of the transformer that case 02 has weights for."""

    embed_time, embed_text = CausalDiT.embed_time, CausalDiT.embed_text

    def __init__(self, config: DiTConfig) -> None:
        rngs, width = nnx.Rngs(0), config.width
        self.config = config
        self.text_embed = MLP(config.text_dim, width, width, gelu_tanh, rngs=rngs)
        self.time_embed = MLP(config.freq_dim, width, width, jax.nn.silu, rngs=rngs, float32=True)
        self.time_project = Linear(width, 6 * width, rngs=rngs, float32=True)


def embeddings(case: Case) -> Iterator[Check]:
    config, want, tolerance = dit_config(case["config"]), dict(case.outputs())[""], case.tolerance("float32")
    rules = [rule for rule in DIT_RULES if rule.path and rule.path.startswith(("text_embed.", "time_"))]
    model = convert(case.weights, rules, jax.eval_shape(lambda: _Embeddings(config)))
    sinusoid = timestep_sinusoid(case.inputs["t"][None], config.freq_dim)
    times = model.embed_time(jnp.asarray(sinusoid))
    contexts = [case.inputs[key] for key in sorted(case.inputs) if key.startswith("context_")]
    yield Check("sinusoid", sinusoid[0], want["sinusoid"], tolerance)
    yield Check("e", times.e[0], want["e"], tolerance)
    yield Check("e0", times.e0[0], want["e0"], tolerance)
    context = model.embed_text(pad_text(contexts, config.text_len))
    yield Check("context_out", context, want["context_out"], tolerance)


def audio_encoder(case: Case) -> Iterator[Check]:
    kwargs, want, tolerance = case["config"], dict(case.outputs())[""], case.tolerance("float32")
    config = DiTConfig(
        layers=1,
        inject_layers=(),
        heads=1,
        width=kwargs["out_dim"],
        audio_dim=kwargs["dim"],
        audio_layers=kwargs["num_layers"],
        audio_tokens=kwargs["num_token"],
    )
    # The case's keys lack the name of the whole audio encoder.
    tensors = {f"casual_audio_encoder.{key}": value for key, value in case.weights.items()}
    encoder = load_part(tensors, lambda: CausalAudioEncoder(config, rngs=nnx.Rngs(0)), "audio_encoder")
    audio = jnp.asarray(case.inputs["audio"])
    prefix, drop = case["motion_frames"]
    full = encoder(jnp.concatenate([jnp.repeat(audio[..., :1], prefix, axis=-1), audio], axis=-1))
    streamed, alone = encode_audio(encoder, audio[:, None]), encoder(audio)
    yield Check("global_full", full.global_[:, 0, :, None], want["global_full"], tolerance)
    yield Check("local_full", full.local[:, 0], want["local_full"], tolerance)
    yield Check(
        "global_sliced (long prefix)", full.global_[:, 0, drop:, None], want["global_sliced"], tolerance
    )
    yield Check("local_sliced (long prefix)", full.local[:, 0, drop:], want["local_sliced"], tolerance)
    yield Check("global_sliced", streamed.global_[:, 0, :, None], want["global_sliced"], tolerance)
    yield Check("local_sliced", streamed.local[:, 0], want["local_sliced"], tolerance)
    yield Check("noprefix_global", alone.global_[:, 0, :, None], want["noprefix_global"], tolerance)
    yield Check("noprefix_local", alone.local[:, 0], want["noprefix_local"], tolerance)


def motion_packer(case: Case) -> Iterator[Check]:
    want, tolerance = dict(case.outputs())[""], case.tolerance("float32")
    height, width = case["latent_hw"]
    channels = next(iter(case.inputs.values())).shape[0]
    tensors = {f"frame_packer.{key}": value for key, value in case.weights.items()}
    packer = load_part(
        tensors, lambda: MotionPacker(channels, case["dim"], rngs=nnx.Rngs(0)), "motion_packer"
    )
    for name, args in case["variants_args"].items():
        motion = jnp.asarray(last(case.inputs[f"{name}.motion"])[None])
        roll = args["roll"] if args["slide"] else args["seq"]
        table = rp.rope(rp.motion_grids(height, width, roll=roll), case["dim"] // case["num_heads"])
        yield Check(f"{name}.tokens", packer(motion, args["add"]), want[f"{name}.tokens"], tolerance)
        yield Check(f"{name}.freq_cos", table.cos, want[f"{name}.freq_cos"], tolerance)
        yield Check(f"{name}.freq_sin", table.sin, want[f"{name}.freq_sin"], tolerance)


def block(case: Case) -> Iterator[Check]:
    """One block with its cache, driven as the streaming forward drives all of them."""
    tolerance, inputs = case.tolerance("float32"), {k: jnp.asarray(v) for k, v in case.inputs.items()}
    config = DiTConfig(
        layers=1, inject_layers=(), width=case["dim"], heads=case["num_heads"], ffn_width=case["ffn_dim"]
    )
    tensors = {f"blocks.0.{key}": value for key, value in case.weights.items()}

    def make() -> Block:  # stacked over one layer, as in the model
        return jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 1))

    layer = jax.tree.map(lambda leaf: leaf[0], load_part(tensors, make, "blocks"))
    text = layer.cross_attn.keys_values(inputs["context"])
    cond_grids = [rp.Grid(*map(tuple, group)) for group in case["cond_groups"]]
    frames, (rows, columns), ring = case["frames_per_block"], case["grid_hw"], case["cache_tokens"]
    tokens, n_cond = frames * rows * columns, case["n_cond"]

    def table(grids: list[rp.Grid]) -> rp.Rope:
        return rp.rope(grids, config.head_dim)

    for variant, want in case.outputs():
        local = int(variant.removeprefix("local_attn")) * rows * columns if variant else None
        table_sink = table(cond_grids)

        def attend_sink(q: jax.Array, kv: KV, table_sink: rp.Rope = table_sink) -> tuple[jax.Array, KV]:
            return dot_product_attention(
                rp.apply_rope(q, table_sink), rp.apply_rope(kv.k, table_sink), kv.v
            ), kv

        sink_out, sink = layer(
            inputs["x_sink"], inputs["e_sink"][:, :1, :, 1], text, attend_sink, Sequence(0, 0, n_cond)
        )
        cache = write_sink(init_cache(config, 1, n_cond, ring), KV(sink.k[None], sink.v[None]))
        kept = KV(cache.k, cache.v)
        got = {"sink_out": sink_out, "cond_k": sink.k, "cond_v": sink.v}
        index = 0
        while f"out_b{index}" in want:
            frame = index * frames
            roll = rp.sink_roll(frame, case["relative_dist"][index])
            attend = functools.partial(
                ring_attention,
                0,
                ring=kept,
                sink_k=cache.sink_k[0],
                slot=ring_slot(index, tokens, ring, local),
                rope=table([rp.video_grid(frame, frames, rows, columns)]),
                sink_rope=table([grid.rolled(roll) for grid in cond_grids]),
            )
            e0 = inputs[f"e_b{index}"][:, :, :, 0]
            got[f"out_b{index}"], kept = layer(
                inputs[f"x_b{index}"], e0, text, attend, Sequence(frames, rows * columns)
            )
            for part, value in kept._asdict().items():
                got[f"cache_{part}_after_b{index}"] = got[f"cache_{part}_final"] = value[0, :, n_cond:]
            index += 1
        for name, value in got.items():
            if name in want:
                yield Check(name, value, want[name], tolerance, variant)


def actor_masks(case: Case) -> Iterator[Check]:
    want = dict(case.outputs())[""]
    _, frames, height, width, _ = want["mask"].shape
    masks = case.inputs["png_masks"]
    regions = route(masks, (frames, height, width))
    logits = regions.reshape(len(regions), -1).T[None]
    yield Check("routing_logits", logits, want["routing_logits"], EXACT)
    yield Check("dilated", dilate(regions)[..., None], want["dilated"], EXACT)
    yield Check("mask", build_actor_masks(masks, (frames, height, width))[..., None], want["mask"], EXACT)
