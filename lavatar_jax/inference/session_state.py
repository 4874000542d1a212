"""A session on disk: one file of plain arrays, from which it goes on bit by bit in another process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lavatar_jax.errors import UserError
from lavatar_jax.files import replacing
from lavatar_jax.inference.pipeline import SlotState
from lavatar_jax.models.attention import KV, RingCache

FORMAT = 1
# Types that numpy does not have by itself are kept as integers of their width, with their name beside them.
EXOTIC = {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}


class SessionState(NamedTuple):
    """Everything that decides what a session shows next, as one pytree of arrays and plain numbers.

    Random numbers are no part of it: they follow from seed and block number. What was finished and not yet
    read stays with the old session.
    """

    slot: SlotState  # rings with the sink, text keys, mask, the decoder's cache
    hearing: dict[str, np.ndarray]  # the feature stream's carry, features and sound of an unfinished block
    waiting: np.ndarray  # sound that waits to be heard
    adapted: np.ndarray | None  # block 0's first latent, the sink to be
    motion: np.ndarray | None
    last_frame: np.ndarray | None
    numbers: dict[str, int]  # seed, counters of blocks and frames, ...
    model: dict[str, Any]  # what it was made with, for refusing another


def save_state(path: str | Path, state: SessionState) -> None:
    """Writes a `.safetensors` file that only its owner can read: there is a face and a voice in it.

    Under a temporary name first. Raises UserError.
    """
    path = Path(path)
    slot = state.slot._replace(next_block=0, drop_frames=0)
    arrays = dict(_named(state._replace(slot=slot, numbers={}, model={})))
    exotic = {name: str(x.dtype) for name, x in arrays.items() if str(x.dtype) in EXOTIC}
    plain = {name: x.view(f"u{x.itemsize}") if name in exotic else x for name, x in arrays.items()}
    numbers = {**state.numbers, "next_block": state.slot.next_block, "drop_frames": state.slot.drop_frames}
    about = {"format": FORMAT, "numbers": numbers, "model": state.model, "dtypes": exotic}
    try:
        with replacing(path) as part:
            part.touch(mode=0o600)  # before there is anything to read
            save_file(plain, part, metadata={"session": json.dumps(about)})
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written; is its folder there, with space left?") from error


def load_state(path: str | Path, decoder_cache: Any) -> SessionState:
    """Reads it. `decoder_cache`: a cache of the decoder, or its shapes, for the tree. Raises UserError."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {})["session"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if about["format"] != FORMAT:
            raise UserError(f"{path} was written by another version; its session cannot go on")
        for name, dtype in about["dtypes"].items():
            arrays[name] = arrays[name].view(EXOTIC[dtype])
        numbers = about["numbers"]
        next_block, drop_frames = numbers.pop("next_block"), numbers.pop("drop_frames")
        rings, text = RingCache(0, 0, 0), KV(0, 0)  # type: ignore[arg-type]
        slot = SlotState(0, rings, text, 0, decoder_cache, 0)  # type: ignore[arg-type]
        names = [name for name, _ in _named({"slot": slot})]
        leaves = [0 if name in ("slot/next_block", "slot/drop_frames") else arrays[name] for name in names]
        slot = jax.tree.unflatten(jax.tree.structure(slot), leaves)
        prefix = "hearing/"
        return SessionState(
            slot=slot._replace(next_block=next_block, drop_frames=drop_frames),
            hearing={n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)},
            waiting=arrays["waiting"],
            adapted=arrays.get("adapted"),
            motion=arrays.get("motion"),
            last_frame=arrays.get("last_frame"),
            numbers=numbers,
            model=about["model"],
        )
    except FileNotFoundError:
        raise UserError(f"there is no saved session {path}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a saved session, or is damaged") from None


def _named(tree: Any) -> list[tuple[str, np.ndarray]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), np.ascontiguousarray(leaf))
        if np.ndim(leaf)
        else (jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf))
        for path, leaf in flat
    ]
