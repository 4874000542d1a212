"""Make one folder of records of several: `python tools/join_data.py shards/part-* --out shards/all`.

For parts that `tools/prepare_data.py --part` made on several machines, with the same options. Shards are hard
links to those of the parts, which may be removed afterwards; on another file system they are copies.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.checkpoints.sources import read_json
from lavatar_jax.cli import parse_options, run
from lavatar_jax.data.made_with import EARLIER, first_difference
from lavatar_jax.data.negative_prompt import NEGATIVE, read_negative
from lavatar_jax.data.preparation_report import render_report
from lavatar_jax.data.shards import DATASET, MANIFEST, PREPARED, Dataset, read_dataset, read_manifest
from lavatar_jax.errors import UserError
from lavatar_jax.files import check_new, link_file, write_errors, write_text
from tools.real_journal import JOURNAL, PICTURES, REPORT, SHEET_CLIPS, read_journal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join:
    """Make one folder of records of several that were prepared with the same options."""

    parts: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg(metavar="PART PART [PART ...]")]
    """Two folders or more that tools/prepare_data.py has finished."""
    out: Annotated[Path, arg(metavar="SHARDS")]
    """Folder for all records, which must not be there yet."""


def join(parts: tuple[Path, ...], out: Path) -> int:
    """Write the folder `out` -> records. An interrupted call leaves OUT.partial, which the next begins anew.

    Raises UserError where parts are unfinished, were prepared with different options or share videos, and
    where `out` is there already or cannot be written.
    """
    check_new(out)
    if len(parts) < 2:
        raise UserError("give two folders or more")
    datasets = [_check_alike(part, parts[0]) for part in parts]
    rows, shards = _all_rows(parts)
    growing = out.with_name(f"{out.name}.partial")
    with write_errors(out):
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        for place, shard in shards.items():
            link_file(place, growing / shard)
        for name in (PREPARED, NEGATIVE):
            if (parts[0] / name).is_file():
                shutil.copyfile(parts[0] / name, growing / name)
        _write_report(parts, growing, poses=sum("pose" in row["shapes"] for row in rows))
        _write_lines(growing / MANIFEST, rows)
        whole = dataclasses.replace(datasets[0], records=len(rows))
        write_text(growing / DATASET, json.dumps(dataclasses.asdict(whole), indent=1) + "\n")
        os.replace(growing, out)
    return len(rows)


def _check_alike(part: Path, first: Path) -> Dataset:
    """What holds for a part. Raises UserError unless it is finished, and as the first one."""
    dataset = read_dataset(part)
    if not (part / PREPARED).is_file():
        raise UserError(f"{part} was not made by tools/prepare_data.py; only such folders are joined")
    settings = {**EARLIER, **read_json(first / PREPARED)}
    if (difference := first_difference(part / PREPARED, settings)) is not None:
        name, found, wanted = difference
        raise UserError(
            f"{part} was prepared with {name} {found}, {first} with {wanted}: they cannot be joined"
        )
    prompts = [None if found is None else found[0] for found in map(read_negative, (part, first))]
    if prompts[0] != prompts[1]:
        raise UserError(
            f"{part} and {first} have different negative prompts ({prompts[0]!r}, {prompts[1]!r}): run "
            "tools/prepare_data.py on one of them again with the other's --negative-prompt"
        )
    return dataset


def _all_rows(parts: tuple[Path, ...]) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """The lines of all manifests with new names of the shards, and these names by the shards' files.

    Raises UserError where shards are missing, or a record is in two parts.
    """
    owners: dict[str, Path] = {}
    shards: dict[Path, str] = {}
    joined = []
    for part in parts:
        for row in read_manifest(part):
            owner = owners.setdefault(row["id"], part)
            if owner is not part:
                raise UserError(f"{owner} and {part} both have a record {row['id']}: they share videos")
            place = part / row["shard"]
            if place not in shards and not place.is_file():
                raise UserError(f"{place} is missing: run tools/prepare_data.py on {part} again")
            shard = shards.setdefault(place, f"shard-{len(shards):05d}.array_record")
            joined.append({**row, "shard": shard})
    return joined, shards


def _write_report(parts: tuple[Path, ...], out: Path, *, poses: int) -> None:
    """The parts' journals and pictures, and the report of them all."""
    videos = [video for part in parts for video in read_journal(part)]
    _write_lines(out / JOURNAL, videos)
    # In turns, so that each part is seen.
    folders = [sorted((part / PICTURES).glob("*.jpg")) for part in parts]
    turns = (path for turn in itertools.zip_longest(*folders) for path in turn if path is not None)
    (out / PICTURES).mkdir()
    pictures = {}
    for path in itertools.islice(turns, SHEET_CLIPS):
        pictures[path.stem] = path.read_bytes()
        link_file(path, out / PICTURES / path.name)
    write_text(out / REPORT, render_report(videos, pictures, poses))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(arguments: list[str]) -> None:
    options = parse_options(Join, arguments, prog="tools/join_data.py")
    records = join(options.parts, options.out)
    print(f"{options.out}: {records} records of {len(options.parts)} folders")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
