"""What a converted model folder holds: `python tools/inspect_checkpoint.py DIR [--verify]`."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import track
from rich.table import Table
from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from lavatar_jax.checkpoints.manifest import Component, Manifest, hash_leaf, read_manifest
from lavatar_jax.checkpoints.orbax_store import stored_leaves
from lavatar_jax.checkpoints.store import load_config
from lavatar_jax.cli import parse_options, run
from lavatar_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a converted model folder holds, and whether it is complete."""

    folder: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Converted model folder."""
    verify: bool = False
    """Also read every number, and compare the hashes."""
    tensors: bool = False
    """Also list every array."""


def problems_of(folder: Path, name: str, component: Component, *, verify: bool) -> list[str]:
    """In what the files of a component differ from the manifest."""
    try:
        leaves = stored_leaves(folder / name)
    except UserError as error:
        return [str(error)]
    problems = [f"{name}/{path} is missing" for path in component.tensors if path not in leaves]
    problems += [f"{name}/{path} is not in the manifest" for path in leaves if path not in component.tensors]
    for path, stored in component.tensors.items():
        if path in leaves and (leaves[path].shape, leaves[path].dtype.name) != (stored.shape, stored.dtype):
            found = f"{leaves[path].dtype} {list(leaves[path].shape)}"
            problems.append(f"{name}/{path} is {found}, not {stored.dtype} {list(stored.shape)}")
    if verify and not problems:
        console = Console(stderr=True)
        for path, stored in track(component.tensors.items(), f"verify {name}", console=console):
            try:
                right = hash_leaf(folder / name / path) == stored.sha256
            except UserError as error:
                problems.append(str(error))
                continue
            if not right:
                problems.append(f"{name}/{path} has other numbers than were written (its sha256 differs)")
    return problems


def component_hash(component: Component) -> str:
    """One hash for all arrays: of their names and hashes, sorted."""
    lines = sorted(f"{path} {stored.sha256}\n" for path, stored in component.tensors.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def show(folder: Path, manifest: Manifest, problems: dict[str, list[str]]) -> None:
    console = Console()
    console.width = max(console.width, 100)
    table = Table(title=f"{folder}: {manifest.dtype}, written by lavatar_jax {manifest.version}")
    for column in ("component", "arrays", "parameters", "dtypes", "GB", "sha256", "state"):
        table.add_column(column, justify="right" if column in ("arrays", "parameters", "GB") else "left")
    for name, component in manifest.components.items():
        dtypes = collections.Counter(stored.dtype for stored in component.tensors.values())
        table.add_row(
            name,
            str(len(component.tensors)),
            f"{component.parameters:,}",
            ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.items()),
            f"{component.bytes / 1e9:.3f}",
            component_hash(component)[:16],
            "damaged" if problems[name] else "complete",
        )
    console.print(table)
    for source in manifest.sources:
        console.print(f"from {source.file}  {source.bytes:,} bytes  sha256 {source.sha256}", soft_wrap=True)
    if manifest.trained is not None:
        console.print(f"but the transformer from {manifest.trained}", soft_wrap=True)
    if manifest.lora is not None:
        kept = "merged" if manifest.lora["merged"] else "kept beside the weights"
        console.print(f"LoRA {manifest.lora['file']}: {manifest.lora['pairs']} pairs, {kept}", soft_wrap=True)


def main(args: list[str]) -> None:
    options = parse_options(Inspect, args, prog="tools/inspect_checkpoint.py")
    manifest = read_manifest(options.folder)
    problems = {
        name: problems_of(options.folder, name, component, verify=options.verify)
        for name, component in manifest.components.items()
    }
    show(options.folder, manifest, problems)
    if options.tensors:
        for name, component in manifest.components.items():
            for path, stored in component.tensors.items():
                print(f"{name}/{path}  {stored.dtype} {list(stored.shape)}  {stored.sha256}")
    found = [problem for component in problems.values() for problem in component]
    if manifest.complete:
        try:
            load_config(options.folder)
        except UserError as error:
            found.append(str(error))
    if found or not manifest.complete:
        raise UserError(
            f"{options.folder} is not complete: {'; '.join(found[:3]) or 'conversion was stopped'}"
        )
    print("complete" + (", and all hashes are right" if options.verify else ""))


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
