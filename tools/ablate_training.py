"""Students that were trained otherwise, for tools/ablate.py: each differs from the first in one option.

    python tools/ablate_training.py [--teacher runs/dit_long] [--vae runs/decoder] [--steps 200] [-- OPTION]
    python tools/ablate_training.py --teacher tiny_forcing --vae tiny -- --data.vae tiny   # shipped models

All train for as many steps from the same model of stage 1, but for the last two, which compare stage 1 with
and without motion frames, from nothing. What follows `--` goes to every training. An interrupted call goes on
where it was. Writes OUT/models/NAME and prints the call that measures them.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.checkpoints.runs import result_step, result_time
from lavatar_jax.cli import parse_options, run
from lavatar_jax.data.made_with import first_difference, write_note
from lavatar_jax.errors import UserError
from tools.package_model import Arguments, package

ROOT = Path(__file__).resolve().parents[1]
STAGE_1, ODE, STAGE_2 = (f"configs/tiny_{name}.py" for name in ("dit", "ode", "distill"))
SYNC_REWARD = ("--dyna.alpha", "0.5", "--dyna.rewards", "lavatar_jax.training.rewards:mouth_sync", "1")
# In so few steps heads move too little without guidance by the prompt. Paths are guided alike.
STAGE_2_OPTIONS = ("--loss.text-guidance", "0.5")
# The records have three latent frames before each clip, of 9 video frames.
SCAFFOLD = ("--model.use-motion", "--model.motion-frames", "9", "3")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of stage 2, and what comes before it."""

    options: tuple[str, ...] = ()
    paths: bool = False  # in a third of the steps the student follows the teacher's paths
    forcing: tuple[str, ...] | None = None  # options of a stage 1 from nothing, which makes the teacher
    data: tuple[str, ...] = ()  # options of data that are its own


VARIANTS = {
    "stage 2, short": Variant(),
    "clean cache": Variant(("--sampling.history", "clean")),
    "fixed-noise cache": Variant(("--sampling.history", "fixed_noise")),
    "no hybrid starts": Variant(("--dyna.hybrid", "0", "--distill.regression", "0")),
    "sync reward": Variant(SYNC_REWARD),
    "no guidance": Variant(("--loss.guidance", "0", "--loss.text-guidance", "0")),
    "trained for 2 steps": Variant(("--sampling.steps", "2")),
    "trained for 1 step": Variant(("--sampling.steps", "1", "--dyna.hybrid", "0")),
    "portraits as references": Variant(data=("--data.other-pose", "0", "--data.clips", "600")),
    "ODE-initialised": Variant(paths=True),
    "short stage 1": Variant(forcing=()),
    "short stage 1 with scaffold": Variant(SCAFFOLD, forcing=SCAFFOLD),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateTraining:
    """Train variants of stage 2 for `tools/ablate.py`."""

    teacher: str = "runs/dit_long"
    """Model of stage 1: a run or a model folder."""
    vae: str = "runs/decoder"
    """What draws the students' latents: a run of stage 0 or of the decoder, or a model folder."""
    steps: int = 200
    """Of stage 2 for each, about 1.5 seconds a step on two CPU cores."""
    forcing_steps: int = 600
    """Of stage 1, for the variants that have their own."""
    only: tuple[str, ...] = ()
    """Train variants with this in their name."""
    out: Path = Path("runs/variants")
    """Runs and models."""


def train(config: str, out: Path, steps: int, options: Sequence[str]) -> None:
    """Raises UserError where the training fails or does not come to its last step, and KeyboardInterrupt
    where it was stopped."""
    command = [sys.executable, "train.py", config, "--out", str(out), "--train.steps", str(steps), *options]
    print("+", shlex.join(command), flush=True)
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it saves
            raise
    if code not in (0, 130):  # 130: it was stopped, and has saved
        raise UserError(f"a training ended with exit code {code}: {shlex.join(command)}")
    if (reached := result_step(out)) != steps:
        raise UserError(f"a training was stopped at step {reached} of {steps}; run this again to go on")


def _note_settings(path: Path, variant: Variant, options: AblateTraining, shared: Sequence[str]) -> None:
    """Raises UserError where what is in the folder of a variant was made with others."""
    settings = {
        **dataclasses.asdict(variant),
        **{name: getattr(options, name) for name in ("teacher", "vae", "steps", "forcing_steps")},
        "teacher_time": result_time(Path(options.teacher)),
        "vae_time": result_time(Path(options.vae)),
        "options": list(shared),
    }
    if (difference := first_difference(path, settings)) is not None:
        setting, found, wanted = difference
        raise UserError(
            f"{path.with_suffix('')} was trained with {setting} {found}, not {wanted}: choose another --out, "
            f"or remove all of {path.parent}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_note(path, settings)


def train_variant(name: str, options: AblateTraining, shared: Sequence[str]) -> Path:
    """-> the model folder. Raises as `train` does."""
    slug = name.replace(" ", "-").replace(",", "")
    out, teacher = options.out.resolve() / slug, options.teacher
    model = options.out / "models" / slug
    variant, steps = VARIANTS[name], options.steps
    _note_settings(options.out / f"{slug}.json", variant, options, shared)
    if (model / "config.json").is_file():
        return model
    if variant.data:
        shared = [*shared, *variant.data, "--data.folder", str(out.with_name(f"{slug}-latents"))]
    if variant.forcing is not None:
        forcing = out.with_name(f"{slug}-forcing")
        train(STAGE_1, forcing, options.forcing_steps, [*variant.forcing, *shared])
        teacher = str(forcing)
    start = ["--init", teacher]
    if variant.paths:
        paths = out.with_name(f"{slug}-paths")
        train(ODE, paths, steps // 3, [*start, *STAGE_2_OPTIONS, *shared])
        start, steps = ["--init", str(paths), "--teacher", teacher], steps - steps // 3
    train(STAGE_2, out, steps, [*start, *STAGE_2_OPTIONS, *variant.options, *shared])
    return package(Arguments(vae=options.vae, dit=str(out), out=str(model), name=slug))


def main(arguments: list[str]) -> None:
    own, shared = arguments, []
    if "--" in arguments:
        split = arguments.index("--")
        own, shared = arguments[:split], arguments[split + 1 :]
    options = parse_options(AblateTraining, own, prog="tools/ablate_training.py")
    chosen = [name for name in VARIANTS if not options.only or any(part in name for part in options.only)]
    if not chosen:
        raise UserError(
            f"no variant has {' or '.join(options.only)} in its name; there are {', '.join(VARIANTS)}"
        )
    models = {name: train_variant(name, options, shared) for name in chosen}
    named = [argument for name, folder in models.items() for argument in ("--model", f"{name}={folder}")]
    print(shlex.join(["python", "tools/ablate.py", *named]))


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
