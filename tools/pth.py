"""Tensors of `torch.save` files (.pth, .bin): the only place of a conversion that needs torch."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lavatar_jax.checkpoints.sources import TensorInfo
from lavatar_jax.errors import UserError

REMAP_BYTES = 2**26


class PickledTensors:
    """A state dictionary, loaded by torch's weights-only loader, which runs no code of the file.

    Numbers stay in the mapped file until they are used. The file is mapped anew now and then, since the pages
    that were used count as our memory for as long as a mapping lives.

    Raises UserError when torch is not installed, or the file is cut off, holds code, or no tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self._mapped = _load(path)
        self._used = 0
        self.infos = {
            key: TensorInfo(tuple(tensor.shape), _dtype(tensor, key, path), path)
            for key, tensor in self._mapped.items()
        }

    def read(self, key: str) -> np.ndarray:
        info = self.infos[key]
        if self._used + info.nbytes > REMAP_BYTES:
            self._mapped, self._used = {}, 0  # unmapped before the next mapping
            self._mapped = _load(self.path)
        self._used += info.nbytes
        tensor, torch = self._mapped[key], _torch(self.path)
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return flat.numpy().view(info.dtype).reshape(info.shape)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path} can be read by torch only, which is not installed: pip install "lavatar-jax[convert]" '
            f"(or put {path.with_suffix('.safetensors').name} beside it instead)"
        ) from None
    return torch


def _load(path: Path) -> dict[str, Any]:
    torch = _torch(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy it there") from None
    if not zipped:
        raise UserError(f"{path} is refused: it is no torch.save file, and a bare pickle may hold code")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off (its list of contents, at the end, is not there); copy it again")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "not valid")
        raise UserError(
            f"{path} is refused: it holds code or objects beside tensors, none of which was run ({reason})"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); copy it again") from None
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors")
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {key} is a {type(tensor).__name__}, not a tensor")
    return tensors


def _dtype(tensor: Any, key: str, path: Path) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise UserError(f"{path}: the tensor {key} has the unknown dtype {name}") from None
