"""Students that were trained otherwise, for tools/ablate.py: each differs from the first in one option.

    python tools/ablate_training.py [--teacher runs/dit] [--vae runs/decoder] [--seconds 300] [-- OPTION ...]

All start from the same model of stage 1 and train for the same time; what follows `--` goes to every
training. An interrupted call goes on where it was. Writes OUT/models/NAME and prints the call that measures
them.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import parse_options, run
from lavatar_jax.errors import UserError
from tools.package_model import Arguments, package

ROOT = Path(__file__).resolve().parents[1]
STAGE_2, ODE = "configs/tiny_distill.py", "configs/tiny_ode.py"
SYNC_REWARD = ("--dyna.alpha", "0.5", "--dyna.rewards", "lavatar_jax.training.rewards:mouth_sync", "1")

# Name in the table -> options of stage 2
VARIANTS: dict[str, tuple[str, ...]] = {
    "stage 2, short": (),
    "clean cache": ("--sampling.history", "clean"),
    "fixed-noise cache": ("--sampling.history", "fixed_noise"),
    "no hybrid starts": ("--dyna.hybrid", "0", "--distill.regression", "0"),
    "sync reward": SYNC_REWARD,
    "no guidance": ("--loss.guidance", "0", "--loss.text-guidance", "0"),
    "2 steps": ("--sampling.steps", "2"),
    "1 step": ("--sampling.steps", "1", "--dyna.hybrid", "0"),
    "ODE-initialised": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateTraining:
    """Train variants of stage 2 for `tools/ablate.py`."""

    teacher: str = "runs/dit"
    """Model of stage 1: a run or a model folder."""
    vae: str = "runs/decoder"
    """What draws the students' latents: a run of stage 0 or of the decoder, or a model folder."""
    seconds: float = 300.0
    """Of training for each; compiling takes longer."""
    only: tuple[str, ...] = ()
    """Train variants with this in their name."""
    out: Path = Path("runs/variants")
    """Runs and models."""


def train(config: str, options: Sequence[str]) -> None:
    """Raises UserError where the training fails, and KeyboardInterrupt where it was stopped."""
    command = [sys.executable, "train.py", config, *options]
    print("+", shlex.join(command), flush=True)
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it saves
            raise
    if code:
        raise UserError(f"a training ended with exit code {code}: {shlex.join(command)}")


def train_variant(name: str, options: AblateTraining, shared: Sequence[str]) -> Path:
    """-> the model folder. Raises as `train` does."""
    slug = name.replace(" ", "-").replace(",", "")
    out, teacher = options.out.resolve() / slug, options.teacher
    model = options.out / "models" / slug
    if (model / "config.json").is_file():
        return model
    seconds = options.seconds
    start = ["--init", teacher]
    if name == "ODE-initialised":  # a third of the time follows paths
        ode = out.with_name(f"{slug}-paths")
        train(ODE, [*start, "--out", str(ode), "--train.seconds", str(seconds / 3), *shared])
        start, seconds = ["--init", str(ode), "--teacher", teacher], seconds * 2 / 3
    train(
        STAGE_2,
        [*start, "--out", str(out), "--train.seconds", str(seconds), *VARIANTS[name], *shared],
    )
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
