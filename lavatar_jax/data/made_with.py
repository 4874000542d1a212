"""Notes in a folder of the options that its contents were made with, so that other ones are not forgotten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavatar_jax.data.shards import RENDERED
from lavatar_jax.errors import UserError
from lavatar_jax.files import write_text

# What folders had before there was a choice: their notes do not name it.
EARLIER = {"pixels": 0, "other_light": 0.0}


def write_note(path: Path, options: Mapping[str, Any]) -> None:
    """Atomically. Raises UserError."""
    write_text(path, json.dumps(options, indent=1) + "\n")


def first_difference(path: Path, options: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, noted, wanted) of an option that is another one in the note; `a.b` is b of the mapping a.

    None where all are the same. What there is no note of, as in folders of earlier versions (but for
    `EARLIER`), and what is not known now (None) is not compared. Raises UserError where the note is damaged.
    """
    if not path.is_file():
        return None
    try:
        found = _flat(dict(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; prepare the data again in another folder") from None
    for name, wanted in _flat(json.loads(json.dumps(options))).items():
        noted = found.get(name, EARLIER.get(name))
        if wanted is not None and noted not in (None, wanted):
            return name, noted, wanted
    return None


def check_rendering(folder: Path, options: Mapping[str, Any]) -> None:
    """Raises UserError where clips in a stage's `--data.folder` were made with other options than these."""
    if (difference := first_difference(folder / RENDERED, options)) is None:
        return
    name, found, wanted = difference
    what = f"--data.{name.replace('_', '-')} {found}, not {wanted}"
    if name == "vae_step":
        what = f"step {found} of {options['vae']}, which is at step {wanted} now"
    if name == "vae_time":
        what = f"another training of {options['vae']} than the one that is there now"
    raise UserError(
        f"the clips in {folder} were made with {what}: choose another --data.folder, or remove it"
    )


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        inner = {f"{name}.{key}": x for key, x in _flat(value).items()} if isinstance(value, dict) else {}
        flat |= inner or {name: value}
    return flat
