"""Make a model folder of the published PyTorch checkpoints, in bounded memory; run again, it goes on.

python tools/convert.py --wan Wan2.2-S2V-14B --lora liveavatar.safetensors --out live-avatar
python tools/convert.py --wan Wan2.2-S2V-14B --dry-run
python tools/convert.py --manifest dit.json vae.json --dry-run
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Table
from tyro.conf import arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; numbers only pass through here

from lavatar_jax.checkpoints.conversion import Task, convert_folder
from lavatar_jax.checkpoints.dry_run import plan_folder, plan_listings
from lavatar_jax.checkpoints.hub import LORA_FILES, WAN_FILES, resolve
from lavatar_jax.checkpoints.plan import Plan
from lavatar_jax.cli import parse_options, run
from lavatar_jax.config import SAMPLING_PRESETS
from lavatar_jax.errors import UserError
from tools.pth import PickledTensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Make a model folder of the published PyTorch checkpoints."""

    wan: Annotated[str | None, arg(metavar="DIR|OWNER/MODEL")] = None
    """Folder of the published checkpoint (Wan2.2-S2V-14B), or its name on the hub."""
    lora: Annotated[str | None, arg(metavar="FILE|OWNER/MODEL")] = None
    """Adapters of the transformer (liveavatar.safetensors), or their name on the hub."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where to put the model folder; it must not be there yet."""
    dtype: Literal["bf16", "fp8", "fp32"] = "bf16"
    """Of transformer and text encoder. fp8: bf16 with the transformer's large linear layers in e4m3."""
    per_channel: bool = False
    """With fp8: a scale for each output instead of one for each weight."""
    merge_lora: bool = False
    """Make the adapters part of the weights (the default)."""
    keep_lora: bool = False
    """Keep the adapters beside the weights: slower, but they can be trained further, and exported again."""
    preset: Literal["release-single", "release-tpp", "paper"] = "release-tpp"
    """How the model is sampled where nothing else is said. paper: adapters of configs/wan14b_distill.py."""
    dry_run: bool = False
    """Only say what would be done: all tensors by component, missing, unexpected, misfits."""
    manifest: Annotated[tuple[Path, ...], arg(metavar="JSON...")] = ()
    """With --dry-run: lists of tensors, {key: [shape, dtype]}, in place of --wan."""

    def run(self) -> None:
        """Raises UserError for wrong options and files."""
        if self.merge_lora and self.keep_lora:
            raise UserError("--merge-lora and --keep-lora exclude each other; give one of them")
        if (self.merge_lora or self.keep_lora) and not self.lora:
            raise UserError("--merge-lora and --keep-lora need the adapters: give --lora FILE")
        if self.per_channel and self.dtype != "fp8":
            raise UserError("--per-channel is about 8-bit weights: give --dtype fp8 too")
        if self.manifest:
            others = dataclasses.replace(self, manifest=(), dry_run=False)
            if not self.dry_run or others != Convert():
                raise UserError(
                    "--manifest lists tensors for --dry-run, without any other option (the tensors of a LoRA "
                    "are one more list)"
                )
            report(plan_listings(self.manifest))
            return
        if self.wan is None:
            raise UserError("give the folder of the published checkpoint: --wan DIR")
        if self.out is None and not self.dry_run:
            raise UserError("say where to put the model folder: --out DIR (or give --dry-run)")
        task = Task(
            wan=resolve(self.wan, WAN_FILES),
            out=self.out or Path("."),
            lora=self._lora(),
            dtype=self.dtype,
            per_channel=self.per_channel,
            merge=not self.keep_lora,
            sampling=SAMPLING_PRESETS[self.preset],
        )
        if self.dry_run:
            report(plan_folder(task, PickledTensors))
            return
        bars = Bars()
        try:
            manifest = convert_folder(task, PickledTensors, bars)
        finally:
            if bars.tasks:  # stopping prints a line, even where nothing was shown
                bars.stop()
        count = sum(component.parameters for component in manifest.components.values())
        print(f"{self.out}: {count:,} parameters, complete")

    def _lora(self) -> Path | None:
        if self.lora is None or Path(self.lora).is_file():
            return None if self.lora is None else Path(self.lora)
        if self.lora.endswith(".safetensors"):
            raise UserError(f"--lora {self.lora}: no such file; give the .safetensors file of the adapters")
        return resolve(self.lora, LORA_FILES, option="--lora") / LORA_FILES[0]


class Bars(Progress):
    """Progress on stderr, in bytes, bytes a second and time that is left."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:13}"), BarColumn(), DownloadColumn(), SpeedColumn())
        super().__init__(*columns, TimeRemainingColumn(), console=Console(stderr=True))

    def begin(self, hashed: int, written: int) -> None:
        self.start()
        self._hash = self.add_task("hash sources", total=hashed)
        self._write = self.add_task("write", total=written)

    def hashed(self, count: int) -> None:
        self.update(self._hash, advance=count)

    def written(self, count: int) -> None:
        self.update(self._write, advance=count)


def report(plans: list[Plan]) -> None:
    """A table of the plans. Raises UserError if any has problems, after listing them."""
    table = Table("component", title="dry run: nothing is written")
    for name in ("mapped", "dropped", "missing", "unexpected", "misfits", "parameters", "bytes"):
        table.add_column(name, justify="right")
    for plan in plans:
        counts = (plan.mapped, plan.dropped, plan.missing, plan.unexpected, plan.mismatched)
        cells = [*(str(len(keys)) for keys in counts), f"{plan.parameters:,}", f"{plan.nbytes:,}"]
        table.add_row(plan.component, *cells)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    problems = [f"{plan.component}: {problem}" for plan in plans for problem in plan.problems]
    for problem in problems:
        print(f"- {problem}")
    if problems:
        raise UserError(f"{len(problems)} problem(s), the first: {problems[0]}")


def main(args: list[str]) -> None:
    parse_options(Convert, args, prog="tools/convert.py").run()


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
