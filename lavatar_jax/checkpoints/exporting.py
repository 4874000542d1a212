"""From a model folder back to PyTorch: published file names, key names and layouts, in safetensors.

Tensors stream through one at a time. Numbers stay what they are, but 8-bit weights become bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lavatar_jax.checkpoints.convert import Rule, key_of, rule_of
from lavatar_jax.checkpoints.disk import check_space
from lavatar_jax.checkpoints.lora_keys import DEFAULT_SCALE
from lavatar_jax.checkpoints.manifest import bytes_of, read_manifest
from lavatar_jax.checkpoints.orbax_store import open_leaf, stored_leaves
from lavatar_jax.checkpoints.published import FILES, RULES, SPEECH, TOKENIZER, dit_settings
from lavatar_jax.checkpoints.sources import DTYPES, SafetensorsFile
from lavatar_jax.checkpoints.store import DIT, VAE, is_converted, load_config, model_folder
from lavatar_jax.checkpoints.tables_vae import VAE_RULES
from lavatar_jax.errors import UserError
from lavatar_jax.files import check_new, write_errors
from lavatar_jax.models.avatar import AvatarConfig
from lavatar_jax.models.wav2vec2 import Wav2Vec2Config

SHARD_BYTES = 5 * 10**9
LORA = "liveavatar.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

ReadPart = Callable[[int | None], np.ndarray]  # one layer of a parameter, or all of it


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A stored array with our path, of which layers can be read."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: ReadPart


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A PyTorch tensor that will be written."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def export_folder(name: str | Path, out: Path, *, shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Write the PyTorch form of a model folder, or of a shipped model; -> tensors by component.

    Raises UserError if `out` is there already or cannot be written, the disk is too small, or the folder is
    damaged; nothing is left behind then.
    """
    check_new(out)
    folder = model_folder(name)
    config = load_config(folder)
    files = _files(folder, config)
    partial = out.with_name(out.name + ".partial")
    with write_errors(out):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            check_space(partial, sum(tensor.nbytes for tensors in files.values() for tensor in tensors))
            partial.mkdir(parents=True)
            for component, tensors in files.items():
                if component == "dit":
                    write_shards(partial, tensors, shard_bytes)
                else:
                    file = partial / _file_of(component, config)
                    file.parent.mkdir(exist_ok=True)
                    write_safetensors(file, tensors)
            write_json(partial / "config.json", dit_settings(config.dit))
            if config.speech is not None:
                write_json(partial / SPEECH / "config.json", speech_settings(config.speech))
            if (folder / "tokenizer").is_dir():
                shutil.copytree(folder / "tokenizer", partial / TOKENIZER)
            os.sync()
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return {component: len(tensors) for component, tensors in files.items()}


def _files(folder: Path, config: AvatarConfig) -> dict[str, list[Tensor]]:
    """The tensors of each component, and of adapters ("lora"), in the order in which they are written."""
    files = {}
    for component in FILES:
        if (parameters := _parameters(folder, component)) is None:
            continue
        rules = VAE_RULES[config.vae.kind] if component == "vae" else RULES[component]
        weights = [p for p in parameters if not p.path.endswith((".weight.a", ".weight.b"))]
        files[component] = list(tensors_of(weights, rules))
        if component == "dit" and len(weights) < len(parameters):
            files["lora"] = list(adapter_tensors(parameters, rules, _adapters_scale(folder)))
    return files


def _file_of(component: str, config: AvatarConfig) -> str:
    """The published name of a component that is one file."""
    if component == "lora":
        return LORA
    name = next(file for file in FILES[component] if file.endswith(".safetensors"))
    return name.replace("Wan2.1", "Wan2.2") if config.vae.kind == "wan22" else name


def write_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """A .safetensors file, one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end := end + tensor.nbytes]
        header[tensor.key] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            numbers = tensor.read()
            if numbers.shape != tensor.shape or numbers.dtype != tensor.dtype:
                raise ValueError(f"{tensor.key} is {numbers.dtype} {numbers.shape}, not as announced")
            file.write(bytes_of(np.ascontiguousarray(numbers)))


def speech_settings(config: Wav2Vec2Config) -> dict[str, Any]:
    """transformers' `config.json` of a speech encoder."""
    return {
        "architectures": ["Wav2Vec2ForCTC"], "model_type": "wav2vec2", "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers, "hidden_size": config.width, "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_width, "hidden_act": "gelu", "layer_norm_eps": config.eps,
        "feat_extract_norm": "layer", "feat_extract_activation": "gelu", "conv_bias": True,
        "conv_dim": config.conv_width, "conv_kernel": config.conv_kernel, "conv_stride": config.conv_stride,
        "num_feat_extract_layers": len(config.conv_width), "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": config.position_kernel,
        "num_conv_pos_embedding_groups": config.position_groups,
        "mask_time_prob": 0.05 if config.mask_vector else 0.0, "mask_feature_prob": 0.0,
    }  # fmt: skip


def _parameters(folder: Path, component: str) -> list[Parameter] | None:
    """What a model folder holds of a component, 8-bit weights as one parameter each; None: not there."""
    small = folder / {"dit": DIT, "vae": VAE}.get(component, "none")
    if (folder / component).is_dir():
        return _orbax_parameters(folder / component)
    return _file_parameters(SafetensorsFile(small)) if small.is_file() else None


def _file_parameters(file: SafetensorsFile) -> list[Parameter]:
    def read(path: str, layer: int | None) -> np.ndarray:
        return file.read(path) if layer is None else file.read(path)[layer]

    return [
        Parameter(path, info.shape, info.dtype, functools.partial(read, path))
        for path, info in file.infos.items()
    ]


def _orbax_parameters(folder: Path) -> list[Parameter]:
    def read(path: str, layer: int | None) -> np.ndarray:
        array = open_leaf(folder / path)
        return (array if layer is None else array[layer]).read().result()

    def dequantised(path: str, layer: int | None) -> np.ndarray:
        codes, scale = (read(f"{path}.{part}", layer) for part in ("values", "inverse_scale"))
        return (codes.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)

    parameters = []
    for path, leaf in stored_leaves(folder).items():
        whole, _, part = path.rpartition(".")
        if part == "inverse_scale":
            continue
        name, reader, dtype = (path, read, leaf.dtype)
        if part == "values":
            name, reader, dtype = (whole, dequantised, ml_dtypes.bfloat16)
        parameters.append(
            Parameter(name, tuple(leaf.shape), np.dtype(dtype), functools.partial(reader, name))
        )
    return parameters


def tensors_of(parameters: Iterable[Parameter], rules: Sequence[Rule]) -> Iterator[Tensor]:
    """The PyTorch tensors of these parameters. Raises UserError for a parameter that no rule names."""
    for parameter in parameters:
        path = parameter.path.removesuffix(".base")
        if (rule := rule_of(rules, path)) is None or (inverse := rule.resolve_transform().inverse) is None:
            raise UserError(f"the parameter {path} has no name in PyTorch")
        shape = parameter.shape[1:] if rule.stacked else parameter.shape
        ours = np.broadcast_to(np.zeros((), parameter.dtype), shape)
        for layer in range(parameter.shape[0]) if rule.stacked else [None]:
            key = key_of([rule], path, layer)
            assert key is not None

            yield Tensor(key, inverse(ours).shape, parameter.dtype, _bind(inverse, parameter.read, layer))


def _bind(inverse: Callable[[np.ndarray], np.ndarray], read: ReadPart, layer: int | None) -> Any:
    return lambda: inverse(read(layer))


def adapter_tensors(parameters: Iterable[Parameter], rules: Sequence[Rule], scale: float) -> Iterator[Tensor]:
    """The adapters among the parameters (`NAME.weight.a` [*L, in, r], `.b` [*L, r, out]), in peft's spelling.

    `scale`: alpha / rank of all of them. In the file it is the released adapters' 0.5, which their loader
    applies to everything, and the rest is multiplied into B; an alpha for each tells the same to all other
    readers. Raises UserError for an adapted weight that no rule names.
    """
    factor = scale / DEFAULT_SCALE

    def scaled(b: np.ndarray) -> np.ndarray:
        return b.T if factor == 1 else b.T * b.dtype.type(factor)

    for parameter in parameters:
        weight, _, part = parameter.path.rpartition(".")
        if part not in ("a", "b"):
            continue
        if (rule := rule_of(rules, weight)) is None:
            raise UserError(f"the parameter {weight} has no name in PyTorch: its adapters cannot be exported")
        for layer in range(parameter.shape[0]) if rule.stacked else [None]:
            module = f"base_model.model.{(key_of([rule], weight, layer) or weight).removesuffix('.weight')}"
            shape = parameter.shape[-2:][::-1]
            key = f"{module}.lora_{part.upper()}.default.weight"
            form = np.transpose if part == "a" else scaled
            yield Tensor(key, shape, parameter.dtype, _bind(form, parameter.read, layer))
            if part == "a":
                alpha = np.float32(DEFAULT_SCALE * shape[0])
                yield Tensor(f"{module}.alpha", (), alpha.dtype, functools.partial(np.asarray, alpha))


def _adapters_scale(folder: Path) -> float:
    """alpha / rank of the adapters that a folder keeps beside its weights."""
    record = read_manifest(folder).lora if is_converted(folder) else None
    return DEFAULT_SCALE if record is None else float(record["scale"])


def write_shards(folder: Path, tensors: Sequence[Tensor], shard_bytes: int) -> None:
    """`diffusion_pytorch_model-00001-of-0000N.safetensors` and the index of what is where."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    placed = {}
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        placed.update({tensor.key: name for tensor in shard})
    total = sum(tensor.nbytes for tensor in tensors)
    write_json(folder / FILES["dit"][0], {"metadata": {"total_size": total}, "weight_map": placed})


def write_json(path: Path, values: Any) -> None:
    """As readable JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")
