"""What the runs of all stages have in common, besides model, data and loss."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lavatar_jax.checkpoints.runs import CheckpointConfig, result_step, result_time
from lavatar_jax.data.negative_prompt import read_negative
from lavatar_jax.errors import UserError
from lavatar_jax.files import lock_folder, write_text
from lavatar_jax.parallel import MeshConfig
from lavatar_jax.training.distributed import DistributedConfig, first_process_only
from lavatar_jax.training.logs import LogConfig
from lavatar_jax.training.loop import Feed, LoopConfig, State, StepFn, fit
from lavatar_jax.training.optim import OptimConfig
from lavatar_jax.training.precision import multiplies_bfloat16
from lavatar_jax.training.samples import SamplesConfig
from lavatar_jax.training.state import LossFn, TrainStep, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """`out`: the folder of checkpoints and logs; a run that is there already goes on. `init`: where weights
    come from: another run (its averages), or a model folder; None: random ones."""

    out: str
    init: str | None = None
    train: LoopConfig
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    samples: SamplesConfig = dataclasses.field(default_factory=SamplesConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def note_other_clips(frames: int, planned: int) -> None:
    """Say where records are of another length (latent frames) than a config was made for: any will do, but a
    short clip may never fill the ring or let the sink roll."""
    if frames != planned:
        print(
            f"note: the records hold clips of {frames} latent frames, the config is made for {planned}: "
            f"prepare the data with --blocks {planned // 3}, or say --clip {frames} ROWS COLUMNS",
            file=sys.stderr,
        )


def run_step(run: Run, loss: LossFn, optimizer: optax.GradientTransformation) -> TrainStep:
    """`state.make_train_step` with the settings of a run."""
    train = run.train
    return make_train_step(
        loss, optimizer, train.ema_decay, run.optim.clip, accumulate=train.accumulate, spike=train.spike
    )


def fit_run(
    run: Run,
    step_fn: StepFn[State],
    state: State,
    frozen: Any,
    batches: Feed,
    mesh: Mesh,
    **options: Any,
) -> State:
    """`loop.fit` with the settings of a run, which it writes down; `options` are its other arguments.

    Raises UserError where another process trains in its folder, and where it would go on with other frozen
    weights than it began with.
    """
    if run.samples.records and not run.samples.every and options.get("evaluate") is None:
        raise UserError(
            "--samples.every 0 shows none of the records that --samples.records holds out, and this stage "
            "measures nothing on them: give --samples.records 0"
        )
    if run.train.precision == "operands" and not multiplies_bfloat16():
        print(
            "note: --train.precision operands is float32 here: no CPU that multiplies bfloat16",
            file=sys.stderr,
        )
    with contextlib.ExitStack() as held:
        first_process_only(lambda: held.enter_context(lock_folder(Path(run.out))))
        if result_step(Path(run.out)) is not None:
            check_continued(run, frozen=bool(jax.tree.leaves(frozen)))
        return fit(
            step_fn,
            state,
            frozen,
            batches,
            run.train,
            Path(run.out),
            checkpoint=run.checkpoint,
            log=run.log,
            optim_schedule=run.optim.schedule,
            mesh=mesh,
            sample_every=run.samples.every,
            accepted=lambda: write_config(run),
            **options,
        )


def origins(run: Run) -> dict[str, int]:
    """When what a run's weights come from was written (`result_time`), where those are runs."""
    places = {name: getattr(run, name, None) for name in ("init", "teacher")}
    times = {name: result_time(Path(place)) for name, place in places.items() if place is not None}
    return {name: time for name, time in times.items() if time is not None}


def negative_prompt(run: Run) -> str | None:
    """What guidance leads away from, of runs that read it beside their records."""
    score = getattr(run, "score", None)
    if score is None or score.without_text != "negative":
        return None
    found = read_negative(run.data.folder)  # type: ignore[attr-defined]
    return None if found is None else found[0]


def check_continued(run: Run, *, frozen: bool = True) -> None:
    """Raises UserError where a run that goes on would mean something else than when it began: by its
    adapters, by its negative prompt, or (where it has `frozen` weights) by where those come from."""
    path = Path(run.out) / "config.json"
    began = json.loads(path.read_text()) if path.is_file() else {}
    now, lora = json.loads(json.dumps(dataclasses.asdict(run))), began.get("lora") or {}
    if lora.get("rank") and lora["alpha"] != now["lora"]["alpha"]:
        raise UserError(
            f"{run.out} began with --lora.alpha {lora['alpha']:g}, by which its adapters count: give that, "
            "or another --out with --lora.init"
        )
    prompts = began.get("negative_prompt"), negative_prompt(run)
    if None not in prompts and prompts[0] != prompts[1]:
        raise UserError(
            f"{run.out} began with the negative prompt {prompts[0]!r}, but {prompts[1]!r} is beside its "
            "records now: put the first one back, or choose another --out"
        )
    if frozen:
        _check_origins(run, began)


def _check_origins(run: Run, began: dict[str, Any]) -> None:
    now, then = origins(run), began.get("origins", {})
    for name in ("init", "teacher"):
        place, before = getattr(run, name, None), began.get(name)
        if name not in began or (place is None and before is None):
            continue
        if place is None or before is None:
            told = f"--{name} {before}" if place is None else f"no --{name}"
            raise UserError(f"{run.out} began with {told}: do so again, or choose another --out")
        if name in now and name in then:
            other = now[name] != then[name]
        else:  # a model folder tells no time; it may have been moved, or a run's checkpoints deleted
            other = Path(place).name != Path(before).name
        if other:
            raise UserError(
                f"{run.out} began with {before} as it was then; --{name} {place} is another model or "
                "training, or has gone on since: give the one of then, or choose another --out"
            )


def write_config(run: Run) -> None:
    """`config.json` in the run's folder, by the first process.

    What reads a run builds its model by this file, so a run that is refused must not have written it.
    """
    if jax.process_index() == 0:
        out = Path(run.out)
        out.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(run)
        values |= {"origins": origins(run), "negative_prompt": negative_prompt(run)}
        write_text(out / "config.json", json.dumps(values, indent=1))
