"""What a pipeline of given devices does with a model of a given size, and what 25 frames a second need.

    python tools/plan.py --params 14e9 --gpu h100 --gpus 5 --resolution 720x400
    python tools/plan.py --params 30e9 --dtype fp8 --stages h200,h200,h100,h100 --decoder 4090 --link 10
    python tools/plan.py --params 14e9 --needs 25             # the least of each kind of device
    python tools/plan.py --paper                              # the model against the paper's numbers
    python tools/plan.py ... --calibration step.json          # speed as tools/bench_step.py measured it

The model is lavatar_jax/evaluation/capacity.py; nothing is computed on a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import run
from lavatar_jax.errors import UserError
from lavatar_jax.evaluation.capacity import (
    BLOCK_FRAMES,
    Plan,
    Setup,
    dit_for,
    make_plan,
    needs,
)
from lavatar_jax.evaluation.devices import GPUS, Calibration, from_measurement, gpu
from lavatar_jax.evaluation.paper import PAPER_ROWS, against_paper
from lavatar_jax.files import write_text
from lavatar_jax.inference.output import check_output
from lavatar_jax.parallel import layout_for


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--params", type=float, default=14e9, help="weights of the transformer's blocks, e.g. 14e9")
    add("--resolution", default="720x400", help="HEIGHTxWIDTH pixels, not as --size of generate")
    add("--gpu", default="h100", help=f"all devices alike: {', '.join(GPUS)}")
    add("--gpus", type=int, help="how many in all (default: a stage a step, and the decoder's)")
    add("--stages", help="unlike devices instead, one a stage: h100,h100,h20,h20")
    add("--decoder", help="the decoder's device with --stages (default: shares the last stage's)")
    add("--tensor", type=int, default=1, help="devices that share a stage")
    add("--dtype", choices=("bf16", "fp8"), default="bf16", help="of the large matrices")
    add("--steps", type=int, default=4, help="denoising steps")
    add("--fps", type=float, default=25.0, help="frames a second wanted")
    add("--sessions", type=int, default=1, help="videos at once")
    add("--link", type=float, help="GB/s between stages, if not the devices' own")
    add("--no-motion", action="store_true", help="no packed motion frames in the sink")
    add("--calibration", type=Path, help="JSON of tools/bench_step.py (default: fitted to the paper)")
    add("--needs", type=float, metavar="FPS", help="the least of each kind of device for this speed")
    add("--paper", action="store_true", help="compare the model with the paper's numbers")
    add("--json", type=Path, help="also write the numbers there")
    return result


def setup_from(options: argparse.Namespace) -> Setup:
    """Raises UserError for what does not fit together."""
    try:
        height, width = (int(side) for side in options.resolution.split("x"))
    except ValueError:
        raise UserError(f"--resolution {options.resolution}: expected HEIGHTxWIDTH, as 720x400") from None
    if min(options.steps, options.tensor, options.sessions, options.gpus or 1) < 1:
        raise UserError("--steps, --tensor, --sessions and --gpus must be at least 1")
    if options.decoder and not options.stages:
        raise UserError("--decoder is for --stages; with --gpu all devices are alike")
    if options.gpus and options.stages:
        raise UserError("--stages says how many devices there are: leave --gpus out")
    for name in ("link", "needs", "fps"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"--{name} {value:g} must be more than 0")
    if options.stages:
        ring = tuple(gpu(name) for name in options.stages.split(","))
        decoder = gpu(options.decoder) if options.decoder else None
    else:
        device = gpu(options.gpu)
        stages, own = stages_of(options.gpus, options.tensor, options.steps)
        ring, decoder = (device,) * stages, device if own else None
    setup = Setup(
        config=dit_for(options.params),
        height=height,
        width=width,
        ring=ring,
        decoder=decoder,
        dtype=options.dtype,
        steps=options.steps,
        tensor=options.tensor,
        sessions=options.sessions,
        link=options.link,
        motion=not options.no_motion,
    )
    if options.calibration:
        setup = dataclasses.replace(setup, calibration=calibration_from(options.calibration))
    return setup


def stages_of(gpus: int | None, tensor: int, steps: int) -> tuple[int, bool]:
    """How many stages these devices make, and whether one is left for the decoder."""
    if gpus is None:
        return steps, True
    if tensor == 1:
        layout = layout_for(gpus, steps)
        return layout.stages, layout.own_decoder
    stages, left = divmod(gpus, tensor)
    if left > 1 or not stages or steps % stages:
        raise UserError(
            f"--gpus {gpus} --tensor {tensor}: expected a divisor of {steps} times {tensor}, or 1 more"
        )
    return stages, bool(left)


def calibration_from(path: Path) -> Calibration:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--calibration {path}: {error}") from None
    from tools.bench_step import measured_shape

    if not isinstance(report, dict) or report.get("kind") != "step":
        raise UserError(f"--calibration {path}: not the JSON that tools/bench_step.py writes")
    return from_measurement(report, measured_shape(report))


def describe(plan: Plan, wanted: float) -> str:
    setup = plan.setup
    config = setup.config
    count = f"{setup.devices} devices: {len(setup.ring)} stages" + (
        f" x {setup.tensor}" if setup.tensor > 1 else ""
    )
    own = "a decoder of its own" if setup.decoder else "decoder on the last stage"
    columns = ("weights", "rings", "prompt", "encoders", "VAE", "VAE caches", "working")
    lines = [
        f"{config.layers} layers of {config.width}, {setup.height}x{setup.width}, {setup.dtype}, "
        f"{setup.steps} steps; {count}, {own}",
        f"calibration: {setup.calibration.name}, {setup.calibration.passes:.0f} passes a layer; "
        f"a decoder in {8 * setup.vae_bytes} bits",
        "",
        f"| device | does | ms a block | {' | '.join(columns)} | of memory, GB |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for load in plan.loads:
        cells = [f"{load.memory.get(key, 0) / 1e9:.1f}" for key in columns]
        note = "" if load.fits else " **does not fit**"
        lines.append(
            f"| {load.gpu.name} | {load.role} | {load.work_s * 1e3:.0f} | {' | '.join(cells)} "
            f"| {load.total_gb:.1f} of {load.gpu.memory:.0f}{note} |"
        )
    rate = plan.forward_tflop * setup.steps * setup.sessions * plan.fps / BLOCK_FRAMES / 1e3
    verdict = "yes" if plan.fps >= wanted and plan.fits else "NO"
    lines += [
        "",
        f"  frames a second     {plan.fps:.1f} in each of {setup.sessions} session(s); "
        f"{wanted:g} wanted: {verdict}",
        f"  first frame         {plan.ttff_s:.2f} s after the pipeline is asked",
        f"  arithmetic          {plan.forward_tflop:.1f} TFLOP a forward, {rate:.2f} PFLOP/s in all",
        f"  a hop               {plan.packet_bytes / 1e6:.1f} MB a block, {plan.hop_s * 1e3:.2f} ms; "
        f"{plan.hop_gbs * 1e3:.1f} MB/s at real time",
        f"  energy              {plan.watts:.0f} W, {plan.joules:.0f} J for a second of video",
    ]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    setup = plan.setup
    return {
        "layers": setup.config.layers,
        "width": setup.config.width,
        "resolution": [setup.height, setup.width],
        "dtype": setup.dtype,
        "steps": setup.steps,
        "stages": [device.name for device in setup.ring],
        "decoder": setup.decoder.name if setup.decoder else None,
        "tensor": setup.tensor,
        "sessions": setup.sessions,
        "calibration": setup.calibration.name,
        "devices": setup.devices,
        "fps": plan.fps,
        "ttff_s": plan.ttff_s,
        "tick_s": plan.tick_s,
        "decode_s": plan.decode_s,
        "forward_tflop": plan.forward_tflop,
        "hop_bytes": plan.packet_bytes,
        "hop_s": plan.hop_s,
        "hop_gbs": plan.hop_gbs,
        "watts": plan.watts,
        "joules_per_video_second": plan.joules,
        "fits": plan.fits,
        "loads": [
            {"role": load.role, "gpu": load.gpu.name, "work_s": load.work_s, "memory_bytes": load.memory}
            for load in plan.loads
        ],
    }


def needs_table(setup: Setup, fps: float) -> tuple[str, list[Plan]]:
    lines = [
        f"The least of each kind of device for {fps:g} frames a second, {setup.config.layers} layers of "
        f"{setup.config.width}, {setup.height}x{setup.width}, {setup.steps} steps:",
        "",
        "| device | dtype | devices | layout | FPS | first frame, s | GB at most | W |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plans: list[Plan] = []
    for name, device in GPUS.items():
        for dtype in ("bf16", "fp8"):
            found = needs(dataclasses.replace(setup, dtype=dtype), fps, [device])
            plans += found
            if not found:
                lines.append(f"| {name} | {dtype} | - | none of those tried | | | | |")
            for plan in found:
                layout = f"{len(plan.setup.ring)} x {plan.setup.tensor}" + " + 1" * (
                    plan.setup.decoder is not None
                )
                most = max(load.total_gb for load in plan.loads)
                lines.append(
                    f"| {name} | {dtype} | {plan.setup.devices} | {layout} | {plan.fps:.1f} "
                    f"| {plan.ttff_s:.2f} | {most:.0f} of {device.memory:.0f} "
                    f"| {plan.watts:.0f} |"
                )
    return "\n".join(lines), plans


def paper_table() -> str:
    lines = ["| row | paper | model, 720x400 | error | model, 704x384 | error | |", "|---" * 7 + "|"]
    sizes = [against_paper(720, 400), against_paper(704, 384)]
    for row, *values in zip(PAPER_ROWS, *([value for _, value in size] for size in sizes), strict=True):
        unit = "FPS" if row.quantity == "fps" else "s"
        cells = [f"{value:.2f} | {value / row.value - 1:+.1%}" for value in values]
        lines.append(f"| {row.name} | {row.value:g} {unit} | {' | '.join(cells)} | {row.role} |")
    return "\n".join(lines)


def main() -> None:
    options = parser().parse_args()
    if options.paper:
        print(paper_table())
        return
    if options.json:
        check_output(options.json, ".json")
    setup = setup_from(options)
    if options.needs:
        text, plans = needs_table(setup, options.needs)
        report: Any = [as_json(plan) for plan in plans]
    else:
        plan = make_plan(setup)
        text, report = describe(plan, options.fps), as_json(plan)
    print(text)
    if options.json:
        write_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
