"""Cases 15a (noise levels and losses of distillation, on recorded predictions) and 15b (its rollout)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavatar_jax.training import dmd, self_forcing
from lavatar_jax.training.dmd import Denoiser, DMDConfig
from lavatar_jax.training.flow_grid import FlowGrid
from lavatar_jax.training.self_forcing import Level, SelfForcingConfig
from tools.parity.case import EXACT, Case, Check


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
    scores: dict[str, Any] = {
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


def rollout(case: Case) -> Iterator[Check]:
    """The stub generator's cache is a log of its calls, so that their order is compared too."""
    want, tolerance = dict(case.outputs())[""], case.tolerance("float32")
    frames = case["num_frame_per_block"]
    for name, args in case["variants_args"].items():
        recorded = {key: jnp.asarray(case.inputs[f"{name}.{key}"]) for key in ("noise", "w", "renoise")}
        drawn = jnp.asarray(case.inputs[f"{name}.exit_flags"], jnp.int32)
        config = SelfForcingConfig(
            steps=tuple(case["denoising_step_list_raw"]),
            shift=case["scheduler_shift"],
            cache="context",
            context=args["cn"],
            same_exit=args["same"],
            last_only=args["last"],
        )
        exits, calls, theta = self_forcing.settle_exits(drawn, config), case["calls"][name], jnp.ones(())
        log = (jnp.zeros((), jnp.int32), jnp.zeros((len(calls), 2)))
        lead = recorded["w"].shape[1] - recorded["noise"].shape[1]  # frames of a given first latent
        head = jnp.zeros((1, 0, *case["shape_chw"]))
        if lead:
            head = jnp.asarray(case.inputs[f"{name}.initial_latent"])
            clean = Level(0, jnp.zeros(()), jnp.zeros(()))
            _, log = _stub(theta, head, clean, jnp.asarray(0), log)  # fills the cache as a sink does
        starts = lead + frames * jnp.arange(len(exits))
        learning = self_forcing.learns(starts, recorded["w"].shape[1], config)

        done = self_forcing.roll_out(
            _stub,
            theta,
            _blocks(recorded["noise"], frames),
            _draws(case.inputs[f"{name}.renoise"], np.asarray(exits), len(config.steps)),
            exits,
            starts,
            log,
            config,
        )
        slope = _blocks(recorded["w"][:, lead:], frames)
        dtheta = self_forcing.replay_gradient(_stub, theta, done, starts, log, slope, learning, config)
        output = jnp.concatenate([head, *done.x0], axis=1)
        yield Check(f"{name}.output", output, want[f"{name}.output"], tolerance)
        yield Check(f"{name}.dtheta", dtheta[None], want[f"{name}.dtheta"], tolerance)
        told = [[call["timestep"][0], call["current_start"] / case["frame_seq_length"]] for call in calls]
        yield Check(f"{name}.call_count", done.cache[0], len(calls), EXACT)
        yield Check(f"{name}.calls", done.cache[1], np.array(told), tolerance)
        graded = {call["current_start"] // case["frame_seq_length"] for call in calls if call["grad_enabled"]}
        yield Check(f"{name}.learning", learning, [int(start) in graded for start in starts], EXACT)
        reached = case["denoised_timestep_from_to"][name]
        if args["same"]:
            got = self_forcing.denoised_range(int(exits[0]), config)
            yield Check(f"{name}.denoised_range", np.array(got), np.array(reached), EXACT)


def _stub(theta: jax.Array, x: jax.Array, level: Level, start: jax.Array, log: Any) -> tuple[jax.Array, Any]:
    """The case's generator in closed form; `log` is (number of calls, their timesteps and first frames)."""
    count, lines = log
    lines = lines.at[count].set(jnp.stack([level.t, start.astype(jnp.float32)]))
    return theta * (0.8 * x - 0.1 * level.t / 1000) + 0.01 * start, (count + 1, lines)


def _blocks(x: jax.Array, frames: int) -> jax.Array:
    """[1, K * frames, ...] -> [K, 1, frames, ...]."""
    return x.reshape(-1, frames, *x.shape[2:])[:, None]


def _draws(draws: np.ndarray, exits: np.ndarray, steps: int) -> jax.Array:
    """Noise [n, F, ...] in drawing order, as [K, S, 1, F, ...]: steps before the exit, then the context.

    As much was recorded as the longest rollout needs; a shorter one leaves some of it.
    """
    table = np.zeros((len(exits), steps, 1, *draws.shape[1:]), np.float32)
    each = iter(draws)
    for block, exit_step in enumerate(exits):
        for slot in (*range(exit_step), steps - 1):
            table[block, slot, 0] = next(each)
    return jnp.asarray(table)
