"""The two judges of distillation as functions of noisy clips: the frozen teacher and the critic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from lavatar_jax.models.dit import CausalDiT, Remat
from lavatar_jax.models.dit_forward import teacher_forward, train_forward
from lavatar_jax.training.dmd import Denoiser
from lavatar_jax.training.flow_grid import FlowGrid

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How a network judges a clip.

    `kind`: "bidirectional" sees the whole clip at once, as Wan2.2-S2V does; "causal" is a model of stage 1
    with one noise level for all blocks, for models that have no bidirectional teacher.
    What guidance leads away from: `without_audio` "zeros" (for models trained with audio dropout) or "other",
    the voice of another clip of the batch; `without_text` "zeros" (for models trained with text dropout) or
    "negative", the negative prompt beside the records. "keep" leaves a condition as it is.
    """

    kind: Literal["causal", "bidirectional"] = "bidirectional"
    without_audio: Literal["keep", "zeros", "other"] = "zeros"
    without_text: Literal["keep", "zeros", "negative"] = "zeros"


def unconditional(batch: Batch, config: ScoreConfig) -> Batch:
    """The batch as guidance leads away from it."""
    audio = batch["audio"]
    if config.without_audio != "keep":
        audio = jnp.zeros_like(audio) if config.without_audio == "zeros" else jnp.roll(audio, 1, axis=0)
    batch = {**batch, "audio": audio}
    return batch if config.without_text == "keep" else without_prompt(batch, config)


def without_prompt(batch: Batch, config: ScoreConfig) -> Batch:
    """The batch with the negative prompt, or as text dropout shows it (`ForcingConfig.text_dropout`)."""
    negative = config.without_text == "negative"
    return {**batch, "text": batch["negative_text"] if negative else jnp.zeros_like(batch["text"])}


def pose_of(dit: CausalDiT, batch: Batch) -> Float[Array, "B F H W C"] | None:
    """The pose latents of a batch; None where it has none, or the model takes none."""
    return batch.get("pose") if dit.config.use_pose else None


def make_flow(
    dit: CausalDiT, batch: Batch, config: ScoreConfig, *, remat: Remat = "none"
) -> Callable[[Array, Array], Array]:
    """(noisy clip [B, F, H, W, C], timesteps [B, F]) -> velocity, under the batch's conditions.

    Every frame of a clip has the same timestep.
    """

    def flow(noisy: Array, t_BF: Array) -> Array:
        if config.kind == "causal":
            return train_forward(
                dit,
                noisy,
                t_BF,
                text_BSE=batch["text"],
                audio=batch["audio"],
                ref_B1HWC=batch["reference"],
                pose_BFHWC=pose_of(dit, batch),
                blockwise_audio=True,
                remat=remat,
            )
        return teacher_forward(
            dit,
            noisy,
            t_BF[:, 0],
            text_BSE=batch["text"],
            audio_BPLAT=batch["audio"],
            ref_B1HWC=batch["reference"],
            pose_BFHWC=pose_of(dit, batch),
            remat=remat,
        )

    return flow


def make_denoiser(
    dit: CausalDiT, batch: Batch, config: ScoreConfig, grid: FlowGrid, *, remat: Remat = "none"
) -> Denoiser:
    """`make_flow`, but -> clean latents, at the grid's noise level."""
    flow = make_flow(dit, batch, config, remat=remat)
    return lambda noisy, t_BF: grid.flow_to_x0(noisy, flow(noisy, t_BF), t_BF)


def make_judges(
    teacher: CausalDiT, critic: CausalDiT, batch: Batch, bare: Batch, config: ScoreConfig, grid: FlowGrid
) -> dict[str, Any]:
    """The `Denoiser`s that `dmd.dmd_loss` asks about a batch, by the names that it has for them.

    `bare`: the batch as guidance leads away from it (`unconditional`).
    """
    return {
        "real": make_denoiser(teacher, batch, config, grid),
        "real_uncond": make_denoiser(teacher, bare, config, grid),
        "real_no_text": make_denoiser(teacher, without_prompt(batch, config), config, grid),
        "fake": make_denoiser(critic, batch, config, grid),
        "fake_uncond": make_denoiser(critic, bare, config, grid),
    }
