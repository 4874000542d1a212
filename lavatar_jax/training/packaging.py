"""A run that trained all of a large transformer becomes a model folder: a converted one, its own replaced.

It is written as by a conversion (`checkpoints.conversion`): in OUT.partial, with a journal, one parameter
after the other. What it has in common with its base is linked: files with two names, which stay until both
are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lavatar_jax import __version__
from lavatar_jax.checkpoints.conversion import JOURNAL, finish_folder, write_component, writer_record
from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.disk import check_space
from lavatar_jax.checkpoints.journal import Journal
from lavatar_jax.checkpoints.manifest import MANIFEST, DType, Manifest, hash_file, read_manifest
from lavatar_jax.checkpoints.orbax_store import stored_leaves
from lavatar_jax.checkpoints.outputs import Recipe, outputs_of
from lavatar_jax.checkpoints.plan import Leaf
from lavatar_jax.checkpoints.runs import RunAverage, result_time
from lavatar_jax.checkpoints.store import TOKENIZER, config_from_dict, is_converted, load_config, model_folder
from lavatar_jax.checkpoints.transforms import Transform
from lavatar_jax.config import DiTConfig, SamplingConfig
from lavatar_jax.data.shards import DATASET, read_dataset
from lavatar_jax.errors import UserError
from lavatar_jax.files import check_new, link_file, write_errors
from lavatar_jax.models.avatar import AvatarConfig
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.parallel import STACKED
from lavatar_jax.training.finished import check_parameters, dit_run, lora_of


def package_run(
    run: Path, base: str | Path, out: Path, *, dtype: DType | None = None, name: str | None = None
) -> Manifest:
    """Write the model folder `out`: the averaged transformer of `run`, all else of the model folder `base`.

    `dtype`: of the transformer; None: as the base's. `name`: None: that of `out`. A student (of the ODE stage
    or of stage 2) is sampled as it learned to be, other models as the base. Goes on with what an interrupted
    call left. Memory stays below twice the largest parameter in float32 plus a GiB.

    Raises UserError where `out` is there already, or cannot be written; where `base` is no converted folder;
    where `run` has no checkpoint, or trained adapters, another transformer, or on other latents.
    """
    check_new(out)
    folder = model_folder(base)
    config = load_config(folder)
    if not is_converted(folder):
        raise UserError(f"{base} is a small model, not a converted one: give --vae {base} instead of --base")
    trained = dit_run(run)
    _check_same_model(run, trained, folder, config)
    old = read_manifest(folder)
    others = [part for part in old.components if part != "dit"]
    for part in others:
        stored_leaves(folder / part)  # nothing is missing
    student = "distill" in trained  # what runs of both of their stages have
    config = dataclasses.replace(
        config,
        name=name or out.name,
        sampling=config_from_dict(SamplingConfig, trained["sampling"]) if student else config.sampling,
    )
    model = jax.eval_shape(lambda: CausalDiT(config.dit, rngs=nnx.Rngs(0)))
    recipe = _recipe(old, dtype)
    with contextlib.closing(RunAverage(run)) as average:
        check_parameters(run, average.infos, param_paths(model))
        growing = out.with_name(f"{out.name}.partial")
        task = {
            **writer_record(),
            "--base": [str(folder.resolve()), hash_file(folder / MANIFEST)],
            "--dit": [str(run.resolve()), average.step, result_time(run)],
            "--dtype": [recipe.dtype, recipe.per_channel],
        }
        with write_errors(out):
            growing.mkdir(parents=True, exist_ok=True)
            opened = Journal(growing / JOURNAL, task)
        with contextlib.closing(opened) as journal, write_errors(out):
            for part in [*others, TOKENIZER]:
                _link_files(folder / part, growing / part)
            outputs = list(outputs_of(_leaves(model), average, recipe))
            check_space(growing / "dit", sum(output.nbytes for output in outputs))
            dit = write_component(growing / "dit", outputs, journal)
            manifest = dataclasses.replace(
                old,
                version=__version__,
                dtype=recipe.dtype,
                lora=None,
                components={**old.components, "dit": dit},
                trained=f"{run}, step {average.step}",
            )
            finish_folder(growing, out, config, manifest)
    return manifest


def _check_same_model(run: Path, trained: dict[str, Any], folder: Path, config: AvatarConfig) -> None:
    """Raises UserError unless a run trained all of a transformer like the base's, on latents like its."""
    if lora_of(trained).rank:
        raise UserError(
            f"{run} trained adapters: make a file of them (tools/export_lora.py {run} --out FILE), and of "
            "that a model (tools/convert.py --lora FILE)"
        )
    found = dataclasses.asdict(config_from_dict(DiTConfig, trained["model"]))
    wanted = dataclasses.asdict(config.dit)
    different = [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in wanted
        if found[name] != wanted[name] and name != "attention"  # which is how it is computed, not what
    ]
    if different:
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{run} trained another transformer than that of {folder}: {'; '.join(different[:3])}{more}"
        )
    records = Path(trained["data"]["folder"])
    if not (records / DATASET).is_file():  # as on another machine
        return
    seen, vae = read_dataset(records), config.vae
    if not np.allclose((seen.mean, seen.std), (vae.latent_mean, vae.latent_std)):
        raise UserError(
            f"{run} was trained on latents with other statistics than those of {folder}: {records} was not "
            "prepared with it"
        )


def _recipe(base: Manifest, dtype: DType | None) -> Recipe:
    """How the transformer is written; None: as the base's. 8 bits have scales as the base has them."""
    scales = (x for path, x in base.components["dit"].tensors.items() if path.endswith(".inverse_scale"))
    return Recipe(dtype or base.dtype, any(scale.shape[-1] > 1 for scale in scales))


def _leaves(model: CausalDiT) -> Iterator[Leaf]:
    """What fills a model from a checkpoint with its own names, where layers are together."""
    for path, leaf in param_paths(model).items():
        stacked = path.split(".")[0] in STACKED
        layers = tuple(
            Transform(operator.itemgetter(layer)) for layer in (range(leaf.shape[0]) if stacked else [...])
        )
        yield Leaf(path, tuple(leaf.shape), stacked, (path,) * len(layers), layers)


def _link_files(folder: Path, target: Path) -> None:
    """The same files in another folder; copies of them on another file system."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        link_file(file, place)  # also where an interrupted call left it
