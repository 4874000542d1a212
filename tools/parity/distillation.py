"""Case 15a: the noise levels of distillation, and its losses with recorded predictions as networks."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lavatar_jax.training import dmd
from lavatar_jax.training.dmd import Denoiser, DMDConfig
from lavatar_jax.training.flow_grid import FlowGrid
from tools.parity.case import Case, Check


def losses(case: Case) -> Iterator[Check]:
    """Latents stay [B, F, C, H, W] as recorded: nothing here looks at their last three axes."""
    want, tolerance = dict(case.outputs())[""], case.tolerance("float32")
    inputs = {name: jnp.asarray(value) for name, value in case.inputs.items()}
    grid = FlowGrid(shift=case["scheduler"]["shift"])
    config = DMDConfig(
        shift=case["timestep_shift"],
        lowest=case["min_step"],
        highest=case["max_step"],
        guidance=case["real_guidance_scale"],
        fake_guidance=case["fake_guidance_scale"],
    )

    t, t_flow = inputs["t_offgrid"], np.float32(case["flow_from_x0_timesteps"])
    x_t = jnp.asarray(want["add_noise_offgrid"])  # recorded: at the smallest level rounding counts 200-fold
    raw = want["shift_formula_table"][:, 0]
    open_range = DMDConfig(shift=config.shift, lowest=0, highest=1000)
    shifted = np.stack([raw, dmd.shift_timestep(raw, open_range)], axis=-1)
    of_grid = {
        "sched_timesteps": grid.timesteps,
        "sched_sigmas": grid.sigmas,
        "sched_training_weights": grid.weights,
        "warped_denoising_step_list": grid.denoising_steps(case["dense_steps"]),
        "add_noise_offgrid": grid.add_noise(inputs["clean6"], inputs["noise6"], t),
        "x0_from_flow": grid.flow_to_x0(x_t, inputs["flow6"], t),
        "flow_from_x0": grid.x0_to_flow(x_t, inputs["clean6"], t_flow),
        "training_weight_offgrid": grid.weight(t),
        "shift_formula_table": shifted,
    }

    def networks(name: str) -> Denoiser:
        return lambda noisy, t: inputs[name]

    x, noise = inputs["x_gen"], inputs["noise"]
    t_BF = _per_frame(dmd.shift_timestep(case["raw_timestep"], config), x)
    scores = {
        "real": networks("pred_real_cond"),
        "real_uncond": networks("pred_real_uncond"),
        "fake": networks("pred_fake_cond"),
        "fake_uncond": networks("pred_fake_uncond"),
    }
    noisy = grid.add_noise(x, noise, t_BF)
    difference, real = dmd.score_difference(noisy, t_BF, config, **scores)

    def dmd_loss(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        return dmd.dmd_loss(x, noise, t_BF, config, grid, mask=mask, **scores)

    slope = jax.value_and_grad(dmd_loss, has_aux=True)
    (loss, metrics), dloss_dx = slope(x, None)
    (masked, _), masked_dx = slope(x, inputs["gradient_mask"].astype(bool))
    of_student = {
        "dmd_timestep": t_BF,
        "dmd_noisy": noisy,
        "dmd_grad_raw": difference,
        "dmd_grad_normalised": dmd.normalise(difference, x, real),
        "dmd_gradient_norm": metrics["dmd_gradient_norm"][None],
        "dmd_loss": loss[None],
        "dmd_dloss_dx": dloss_dx,
        "dmd_loss_masked": masked[None],
        "dmd_dloss_dx_masked": masked_dx,
    }

    t_BF = _per_frame(dmd.shift_timestep(case["raw_critic_timestep"], config), x)

    def critic_loss(guess: jax.Array) -> jax.Array:
        return dmd.critic_loss(x, inputs["critic_noise"], t_BF, grid, lambda noisy, t: guess)

    loss, dloss_dguess = jax.value_and_grad(critic_loss)(inputs["critic_pred_x0"])
    of_critic = {
        "critic_timestep": t_BF,
        "critic_noisy": grid.add_noise(x, inputs["critic_noise"], t_BF),
        "critic_loss": loss[None],
        "critic_dloss_dpred_x0": dloss_dguess,
    }
    for name, got in (of_grid | of_student | of_critic).items():
        yield Check(name, got, want[name], tolerance)


def _per_frame(t_B: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(t_B[:, None], x.shape[:2])
