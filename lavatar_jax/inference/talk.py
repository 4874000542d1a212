"""Sound in, frames out: the streaming loop around the rollout or the pipeline, for one speaker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lavatar_jax.checkpoints.store import load_text_encoder
from lavatar_jax.config import SamplingConfig
from lavatar_jax.inference.conditions import image_conditions, to_uint8
from lavatar_jax.inference.images import cover_and_crop, resize_and_crop, video_size
from lavatar_jax.inference.listen import Samples, listen
from lavatar_jax.inference.pipeline import Pipeline
from lavatar_jax.inference.pipeline_rollout import PipelinedBlock, pipeline_rollout
from lavatar_jax.inference.pose import PoseEncoder
from lavatar_jax.inference.rollout import Block, rollout
from lavatar_jax.models.avatar import Avatar, AvatarConfig
from lavatar_jax.models.words import encode_words
from lavatar_jax.parallel import PipelineLayout
from lavatar_jax.types import BlockInput, Conditions


def read_prompt(folder: Path, config: AvatarConfig, prompt: str) -> Float[Array, "1 S E"]:
    """What a model understands of a prompt: states [1, S, E], zeros beyond its end.

    A text encoder is loaded for this and freed again: it is needed once a prompt, and the published one takes
    11 GB. Called before the model itself is loaded, memory holds one of the two at a time.
    Raises UserError where the model folder lacks its text encoder.
    """
    length = config.dit.text_len
    if config.text is None:
        return jnp.asarray(encode_words(prompt, length, config.dit.text_dim))[None]
    # Imported only here: small models need neither the tokeniser nor what cleans prompts for it.
    from lavatar_jax.inference.prompt import PromptTokenizer, encode_prompt

    tokenizer = PromptTokenizer(folder / "tokenizer", length)
    return encode_prompt(load_text_encoder(folder, config), tokenizer, prompt, length)


def photo_conditions(
    avatar: Avatar,
    image_HWC: UInt8[np.ndarray, "H W 3"],
    prompt: str | Float[Array, "1 S E"] = "",
    sampling: SamplingConfig | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
) -> Conditions:
    """A photo of any size and a prompt -> conditions for `talk`.

    The photo is resized and cropped as the model was trained; `image_size` takes the place of the
    configuration's. Models with a text encoder need the states of the prompt (`read_prompt`).
    """
    config = avatar.config
    size = image_size or config.image_size
    fit = cover_and_crop if isinstance(size, int) else resize_and_crop
    if isinstance(prompt, str):
        if config.text is not None:
            raise ValueError(f"{config.name} has a text encoder: give the states that read_prompt returns")
        prompt = jnp.asarray(encode_words(prompt, config.dit.text_len, config.dit.text_dim))[None]
    image = fit(image_HWC, *video_size(image_HWC, size))
    return image_conditions(config.dit, avatar.vae, sampling or config.sampling, image, prompt)


def talk(
    avatar: Avatar,
    conditions: Conditions,
    sound: Samples | Iterable[Samples],
    *,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    pose: Iterable[UInt8[np.ndarray, "T H W 3"]] | None = None,
    streaming: bool = False,
    layout: PipelineLayout | None = None,
) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
    """Mono sound of 16 kHz, whole or in pieces -> frames, block by block (12 frames of 25 a second).

    Frame j shows the sound from j * 40 ms on. The last block (or clip, where clips are decoded whole) is
    completed with silence, so there can be a few frames more than the sound is long. Sound in pieces is read
    as it is needed, in constant memory. `streaming`: hear a whole recording that way too (see `listen`).
    `layout`: spread the work over several devices; None: one.
    """
    sampling = sampling or avatar.config.sampling
    features = listen(avatar, sound, sampling, streaming=streaming)
    poses = None
    if pose is not None:
        height, width = (side * avatar.vae.config.spatial_factor for side in conditions.reference.shape[2:4])
        encoder = PoseEncoder(
            avatar.vae, pose, sampling.clip_blocks, height=height, width=width,
            block_frames=avatar.config.dit.block_frames, lead=sampling.drop_first_frames,
        )  # fmt: skip
        poses = iter(encoder)
    inputs = (BlockInput(jnp.asarray(f[None, None]), next(poses) if poses else None) for f in features)
    blocks: Iterator[Block] | Iterator[PipelinedBlock]
    if layout is None:
        blocks = rollout(avatar.dit, avatar.vae, conditions, inputs, sampling, seed=seed)
    else:
        height, width = conditions.reference.shape[2:4]
        pipeline = Pipeline(avatar.dit, avatar.vae, sampling, height=height, width=width, layout=layout)
        blocks = pipeline_rollout(pipeline, conditions, inputs, seed=seed)
    for block in blocks:
        if block.frames is not None:
            yield np.asarray(to_uint8(block.frames))[0]
