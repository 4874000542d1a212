"""From the published PyTorch folder to a model folder of ours, in bounded memory, resumable.

    published files -> plan (what goes where) -> outputs (cast, merge, round) -> orbax checkpoints

Everything is checked before the first byte is written. The result grows in `OUT.partial`, which a journal
makes resumable, and gets its name when it is complete and on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax

from lavatar_jax import __version__
from lavatar_jax.checkpoints import orbax_store
from lavatar_jax.checkpoints.disk import check_space
from lavatar_jax.checkpoints.journal import Journal
from lavatar_jax.checkpoints.lora_keys import LoraPair, extra_keys, read_lora
from lavatar_jax.checkpoints.manifest import Component, DType, Manifest, SourceFile, Stored, hash_file
from lavatar_jax.checkpoints.orbax_store import stored_leaves, write_metadata
from lavatar_jax.checkpoints.outputs import Recipe, outputs_of
from lavatar_jax.checkpoints.plan import Plan, make_plan
from lavatar_jax.checkpoints.published import (
    RULES,
    TOKENIZER,
    Open,
    Published,
    make_component,
    open_published,
)
from lavatar_jax.checkpoints.sources import LazyTensors, SafetensorsFile
from lavatar_jax.checkpoints.store import config_to_json
from lavatar_jax.checkpoints.stream_write import Advance, Output, write_output
from lavatar_jax.config import RELEASE_TPP, SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.files import check_new, write_errors
from lavatar_jax.models.avatar import AvatarConfig

JOURNAL = "journal.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What to convert. `dtype` is that of transformer and text encoder; the others stay float32.

    fp8: as bf16, with the transformer's large linear layers in e4m3. `merge`: the LoRA becomes part of the
    weights; otherwise its matrices are kept beside them. `sampling`: how the model is to be sampled.
    """

    wan: Path
    out: Path
    lora: Path | None = None
    dtype: DType = "bf16"
    per_channel: bool = False
    merge: bool = True
    sampling: SamplingConfig = RELEASE_TPP


class Progress(Protocol):
    """Told how many bytes there are to hash and to write, and when some of them are done."""

    def begin(self, hashed: int, written: int) -> None: ...

    def hashed(self, count: int) -> None: ...

    def written(self, count: int) -> None: ...


class Silent:
    """No progress is shown."""

    def begin(self, hashed: int, written: int) -> None: ...

    def hashed(self, count: int) -> None: ...

    def written(self, count: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that is known before a byte is written."""

    published: Published
    plans: dict[str, Plan]
    recipes: dict[str, Recipe]
    lora: SafetensorsFile | None

    def outputs(self, component: str) -> Iterator[Output]:
        leaves, tensors = self.plans[component].leaves, self.published.tensors[component]
        return outputs_of(leaves, tensors, self.recipes[component])

    @property
    def files(self) -> list[Path]:
        return self.published.files + ([] if self.lora is None else [self.lora.path])


def convert_folder(task: Task, open_pickle: Open, progress: Progress | None = None) -> Manifest:
    """Convert, or go on with a conversion that was stopped. `open_pickle` opens .pth and .bin files.

    Peak memory is below twice the largest tensor plus a GiB. Raises UserError for everything that is wrong
    with the files, a result that is there already or cannot be written, too little space, and a begun
    conversion of another task.
    """
    progress = progress or Silent()
    check_new(task.out)
    prepared = prepare(task, open_pickle)
    for plan in prepared.plans.values():
        plan.check()
    partial = task.out.with_name(task.out.name + ".partial")
    sizes = {name: [output.nbytes for output in prepared.outputs(name)] for name in prepared.plans}
    total = sum(map(sum, sizes.values()))
    with write_errors(task.out):
        check_space(partial, total)
        partial.mkdir(parents=True, exist_ok=True)
        opened = Journal(partial / JOURNAL, _task_record(task, prepared))
    with contextlib.closing(opened) as journal:
        progress.begin(sum(file.stat().st_size for file in prepared.files), total)
        with _hashing(prepared.files, journal, progress.hashed) as collect:
            components = {}
            for name in prepared.plans:
                with write_errors(task.out):
                    components[name] = write_component(
                        partial / name, prepared.outputs(name), journal, progress.written
                    )
                collect(wait=False)
            hashes = collect(wait=True)
        manifest = Manifest(
            version=__version__,
            dtype=task.dtype,
            sources=tuple(
                SourceFile(file=_name(file, task), bytes=file.stat().st_size, sha256=hashes[file])
                for file in prepared.files
            ),
            lora=_lora_record(task, prepared, hashes),
            components=components,
        )
        with write_errors(task.out):
            shutil.copytree(
                prepared.published.folder / TOKENIZER,
                partial / "tokenizer",
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns(".*"),
            )
            finish_folder(partial, task.out, prepared.published.config, manifest)
    return manifest


def prepare(task: Task, open_pickle: Open) -> Prepared:
    """Open everything and match tensors with parameters; the plans are not checked yet."""
    published = open_published(task.wan, open_pickle)
    config = dataclasses.replace(published.config, sampling=task.sampling)
    published = dataclasses.replace(published, config=config)
    plans = {name: plan_component(name, published) for name in published.tensors}
    lora = None if task.lora is None else SafetensorsFile(task.lora)
    recipes = {name: Recipe("fp32") for name in ("vae", "speech")}
    recipes["text"] = Recipe("fp32" if task.dtype == "fp32" else "bf16")
    recipes["dit"] = Recipe(task.dtype, task.per_channel)
    if lora is not None:
        base = {key: info.shape for key, info in published.tensors["dit"].infos.items()}
        tensors = LazyTensors(lora)
        pairs = read_lora(tensors, base, source=str(lora.path))
        replaced = {name: (lora, key) for name, key in extra_keys(tensors, base).items()}
        for name, (_, key) in replaced.items():
            if lora.infos[key].shape != tuple(base[name]):
                shapes = f"{list(lora.infos[key].shape)}, expected {list(base[name])}"
                raise UserError(f"{lora.path}: the tensor {key} has shape {shapes}")
        recipes["dit"] = dataclasses.replace(
            recipes["dit"], pairs=pairs, merge=task.merge, scale=_common_scale(pairs), replaced=replaced
        )
    return Prepared(published, plans, recipes, lora)


def plan_component(name: str, published: Published) -> Plan:
    config = getattr(published.config, name)
    model = jax.eval_shape(lambda: make_component(name, config))
    return make_plan(name, published.tensors[name].infos, RULES[name], model)


def write_component(
    folder: Path, outputs: Iterable[Output], journal: Journal, advance: Advance = lambda count: None
) -> Component:
    """Write an orbax checkpoint, or go on with it; `advance` is told the bytes that are finished."""
    tensors: dict[str, Stored] = {}
    nbytes = 0
    folder.mkdir(exist_ok=True)
    for output in outputs:
        name = f"{folder.name}/{output.path}"
        tensors[output.path] = write_output(folder, output, journal, name, advance)
        nbytes += output.nbytes
    write_metadata(folder, {path: stored.shape for path, stored in tensors.items()})
    parameters = sum(stored.parameters for stored in tensors.values())
    return Component(parameters=parameters, bytes=nbytes, tensors=tensors)


def finish_folder(partial: Path, out: Path, config: AvatarConfig, manifest: Manifest) -> None:
    """Configuration and manifest come last; when all is there and on disk, the folder gets its name."""
    (partial / "config.json").write_text(config_to_json(config))
    manifest.write(partial)
    for name in manifest.components:
        stored_leaves(partial / name)
    os.sync()
    os.replace(partial, out)
    _sync(out.parent)
    (out / JOURNAL).unlink()


@contextlib.contextmanager
def _hashing(
    files: list[Path], journal: Journal, advance: Callable[[int], None]
) -> Iterator[Callable[..., dict[Path, str]]]:
    """Hashes the sources beside the conversion, which waits for disks where this waits for a core.

    Yields collect(wait): the hashes that are there, or all; each is put into the journal.
    """
    stop = threading.Event()

    def count(read: int) -> None:
        if stop.is_set():
            raise InterruptedError
        advance(read)

    with ThreadPoolExecutor(1) as pool:
        try:
            running: dict[Path, Future[str]] = {}
            for file in files:
                if f"source {file}" in journal.done:
                    advance(file.stat().st_size)
                else:
                    running[file] = pool.submit(hash_file, file, count)

            def collect(wait: bool) -> dict[Path, str]:
                for file, future in list(running.items()):
                    if wait or future.done():
                        journal.record(f"source {file}", future.result())
                        del running[file]
                found = {file: journal.done.get(f"source {file}") for file in files}
                return {file: value for file, value in found.items() if value is not None}

            yield collect
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def writer_record() -> dict[str, Any]:
    """What must be the same for any folder to be gone on with."""
    return {
        "project version": __version__,
        "cut into chunks": [orbax_store.CHUNK_BYTES, orbax_store.JOIN_BYTES, orbax_store.TILES],
    }


def _task_record(task: Task, prepared: Prepared) -> dict[str, Any]:
    """What must be the same for a conversion to be gone on with."""
    sources = [[str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns] for f in prepared.files]
    return {
        **writer_record(),
        "--dtype": [task.dtype, task.per_channel],
        "--lora": None if task.lora is None else [str(task.lora.absolute()), task.merge],
        "set of source files": sources,
    }


def _lora_record(task: Task, prepared: Prepared, hashes: dict[Path, str]) -> dict[str, Any] | None:
    if prepared.lora is None:
        return None
    recipe = prepared.recipes["dit"]
    return {
        "file": prepared.lora.path.name,
        "sha256": hashes[prepared.lora.path],
        "pairs": len(recipe.pairs),
        "scale": recipe.scale,
        "merged": task.merge,
    }


def _common_scale(pairs: dict[str, LoraPair]) -> float:
    """The factor of all pairs; 1 where they differ."""
    scales = {pair.scale() for pair in pairs.values()}
    return scales.pop() if len(scales) == 1 else 1.0


def _name(file: Path, task: Task) -> str:
    return str(file.relative_to(task.wan)) if file.is_relative_to(task.wan) else file.name


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
