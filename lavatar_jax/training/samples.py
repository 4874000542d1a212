"""What a run shows of itself: records that it never trains on, beside what its model makes of their sound."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float
from PIL import Image

from lavatar_jax.config import SamplingConfig, VAEConfig
from lavatar_jax.data.batches import Batch
from lavatar_jax.data.loader import ShardSource
from lavatar_jax.data.pixels import PixelSource
from lavatar_jax.data.record_folder import CorruptRecordError
from lavatar_jax.data.records import file_name
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.sheet import to_uint8
from lavatar_jax.files import replacing
from lavatar_jax.inference.decode import decode
from lavatar_jax.inference.rollout import rollout
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.training.distributed import first_process_only
from lavatar_jax.training.dynaforcing import Reward
from lavatar_jax.training.latents import load_vae
from lavatar_jax.training.state import LossFn, Params
from lavatar_jax.types import BlockInput, Conditions

FRAME = 40  # milliseconds
SCALE = 2
DRAWS = 8  # of noise and its levels, for each record


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """`records`: so many, the last of the data, are not trained on but shown in the report; 0: none. Nor is
    the rest of the videos that they are of.
    `every`: seconds of training between two looks, at the checkpoint that follows; 0: they are measured, but
    never shown."""

    records: int = 0
    every: float = 900.0


def stream_record(
    model: CausalDiT, row: Mapping[str, np.ndarray], sampling: SamplingConfig
) -> Float[np.ndarray, "F H W C"]:
    """The latents that a model streams to the sound of a record (a row of `ShardSource`), in whole blocks.

    Processes that share the model must all call this, and all get the latents.
    """
    blocks = len(row["latent"]) // model.config.block_frames
    sound = row["audio"].shape[-1] // blocks  # frames a block
    one = {name: jnp.asarray(row[name])[None] for name in ("text", "reference", "audio")}
    past = jnp.asarray(row["motion"])[None] if "motion" in row else None
    conditions = Conditions(text=one["text"], reference=one["reference"], motion=past, still=one["reference"])
    inputs = (BlockInput(one["audio"][..., i * sound : (i + 1) * sound]) for i in range(blocks))
    made = [block.latent for block in rollout(model, None, conditions, inputs, sampling)]
    return to_host(jnp.concatenate(made, axis=1)[0])


def to_host(array: Array) -> np.ndarray:
    """An array as numpy; one on devices of several processes in each of them, which must all call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def make_sampler(
    source: ShardSource,
    sampling: SamplingConfig,
    vae_place: str,
    model_of: Callable[[Any], CausalDiT],
    *,
    every: float = 1.0,
) -> Callable[[Any, Path], None] | None:
    """`sample` of `loop.fit`: a moving picture for each held-out record, the truth left, the model's right.

    `model_of(state)`: the network to look at. None where there is nothing to show, or `every` is 0. Raises
    UserError without the VAE that encoded the records (`load_vae`).
    """
    if not source.held_out or not every:
        return None
    config, vae = load_vae(vae_place)
    _check_encoder(source, config, vae_place)

    def frames(row: Mapping[str, np.ndarray], latent: np.ndarray) -> np.ndarray:
        # The causal VAE makes one frame of the first latent: the photo's, which is cut off.
        whole = np.concatenate([row["reference"], latent]) * source.std + source.mean
        return np.asarray(decode(vae, whole[None]))[0, 1:]

    def sample(state: Any, folder: Path) -> None:
        model = model_of(state)
        streams = [(name, row, stream_record(model, row, sampling)) for name, row in held_out_rows(source)]

        def pictures() -> Iterator[tuple[str, np.ndarray]]:
            for name, row, made in streams:
                pair = [frames(row, latent) for latent in (row["latent"][: len(made)], made)]
                yield file_name(name), np.concatenate(pair, axis=2)

        save_moving_pictures(pictures(), folder)

    return sample


def held_out_rows(source: ShardSource | PixelSource) -> list[tuple[str, Batch]]:
    """The held-out records that all processes can read, with their ids; others are noted as skipped."""
    rows: list[Batch | None] = []
    for number in source.held_out:
        try:
            rows.append(source[number])
        except CorruptRecordError as error:
            source.skipped_log.add(source.ids[number], str(error))
            rows.append(None)
    readable = np.array([row is not None for row in rows])
    if jax.process_count() > 1:  # or they would compute different things together
        readable = multihost_utils.process_allgather(readable).all(axis=0)
    names = (source.ids[number] for number in source.held_out)
    return [
        (name, row)
        for name, row, all_can in zip(names, rows, readable, strict=True)
        if all_can and row is not None
    ]


def _check_encoder(source: ShardSource, config: VAEConfig, vae_place: str) -> None:
    """Raises UserError where the records' latents are of a VAE of another architecture."""
    made_by = source.dataset.encoder.get("vae", {})
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    # The statistics are in the records' folder, and a decoder may be another one.
    free = ("latent_mean", "latent_std", "decoder_width")
    other = [name for name in given.keys() & made_by.keys() - set(free) if given[name] != made_by[name]]
    if other:
        name = min(other)
        raise UserError(
            f"samples: the records in {source.folder} were encoded by another VAE than {vae_place} ({name} "
            f"{made_by[name]}, not {given[name]}): give its run or model folder as --data.vae, or "
            "--samples.records 0"
        )


def make_evaluator(
    source: ShardSource | PixelSource,
    loss_fn: LossFn,
    frozen: Params,
    view: Callable[[Batch, int], Batch] = lambda row, draw: row,
) -> Callable[[Any], dict[str, float]] | None:
    """`evaluate` of `loop.fit`: the averaged weights' loss on the held-out records, as `held_out_` and the
    names of the loss's metrics. The noise is the same each time, so that numbers of one run compare.

    `view(row, draw)`: what of a record is looked at in each of several draws.
    """
    if not source.held_out:
        return None
    losses = jax.jit(lambda params, frozen, row, key: loss_fn(params, frozen, row, key)[1])

    def evaluate(state: Any) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for _, row in held_out_rows(source):
            for draw in range(DRAWS):
                one = {name: value[None] for name, value in view(row, draw).items()}
                for name, value in losses(state.average, frozen, one, jax.random.key(draw)).items():
                    found.setdefault(f"held_out_{name}", []).append(float(value))
        return {name: float(np.mean(values)) for name, values in found.items()}

    return evaluate


def make_stream_evaluator(
    source: ShardSource,
    sampling: SamplingConfig,
    model_of: Callable[[Any], CausalDiT],
    rewards: Mapping[str, Reward] | None = None,
) -> Callable[[Any], dict[str, float]] | None:
    """`evaluate` of `loop.fit` for students: what they stream to the sound of the held-out records.

    `held_out_error`: mean square distance from the true latents. `held_out_motion`: deviation in time of the
    latents where the mouth is, as a share of the truth's; a student that collapses stands still. And each of
    `rewards`, as `held_out_` and its name. None where no records are held out.
    """
    if not source.held_out:
        return None

    def motion(latent: np.ndarray, mouth: np.ndarray) -> float:
        return float((np.std(latent, axis=0).mean(axis=-1) * mouth).sum())

    def evaluate(state: Any) -> dict[str, float]:
        model, found = model_of(state), dict[str, list[float]]()
        for _, row in held_out_rows(source):
            made = stream_record(model, row, sampling)
            truth = row["latent"][: len(made)]
            numbers = {
                "error": float(np.mean(np.square(made - truth))),
                "motion": motion(made, row["mouth"]) / max(motion(truth, row["mouth"]), 1e-6),
            }
            batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
            for name, reward in (rewards or {}).items():
                numbers[name] = float(reward.measure(reward.arrays, jnp.asarray(made)[None], batch)[0])
            for name, value in numbers.items():
                found.setdefault(f"held_out_{name}", []).append(value)
        return {name: float(np.mean(values)) for name, values in found.items()}

    return evaluate


def save_moving_pictures(videos: Iterable[tuple[str, Float[np.ndarray, "T H W 3"]]], folder: Path) -> None:
    """Videos in [-1, 1] as NAME.webp in a folder, none of them half a file. Raises UserError.

    Of several processes the first one takes and writes them, and the others wait: making them must be nothing
    that others have a part in.
    """
    first_process_only(lambda: _save_all(videos, folder))


def _save_all(videos: Iterable[tuple[str, Float[np.ndarray, "T H W 3"]]], folder: Path) -> None:
    for name, video in videos:
        pictures = [Image.fromarray(frame) for frame in to_uint8(video)]
        first, *rest = (
            p.resize((SCALE * p.width, SCALE * p.height), Image.Resampling.BICUBIC) for p in pictures
        )
        with replacing(folder / f"{name}.webp") as part:
            first.save(part, format="WebP", save_all=True, append_images=rest, duration=FRAME, loop=0)
