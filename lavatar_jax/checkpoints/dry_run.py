"""What a conversion would do, from a folder's headers or from lists of tensors alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lavatar_jax.checkpoints.conversion import Task, prepare
from lavatar_jax.checkpoints.lora_keys import LoraPair, extra_keys, read_lora
from lavatar_jax.checkpoints.plan import Plan, make_plan
from lavatar_jax.checkpoints.published import (
    RULES,
    Open,
    dit_config,
    inferred_settings,
    make_component,
    speech_config,
    text_config,
    vae_config,
)
from lavatar_jax.checkpoints.sources import LazyTensors, Listing, Tensors
from lavatar_jax.errors import UserError

_CONFIGS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "dit": lambda infos: dit_config(inferred_settings(infos), infos),
    "vae": vae_config,
    "text": text_config,
    "speech": speech_config,
}


def plan_folder(task: Task, open_pickle: Open) -> list[Plan]:
    """The plans of a published folder's components, and of its LoRA; their bytes are those of the result, in
    which the LoRA is part of the transformer. Raises UserError as conversion does."""
    prepared = prepare(task, open_pickle)
    plans = [
        plan
        if plan.problems
        else dataclasses.replace(plan, nbytes=sum(output.nbytes for output in prepared.outputs(name)))
        for name, plan in prepared.plans.items()
    ]
    if prepared.lora is not None:
        recipe = prepared.recipes["dit"]
        whole = [key for _, key in recipe.replaced.values()]
        plans.append(dataclasses.replace(_lora_plan(prepared.lora, recipe.pairs, whole), nbytes=0))
    return plans


def plan_listings(paths: Sequence[Path]) -> list[Plan]:
    """The plans of lists of tensors ({key: [shape, dtype]} as JSON), which are recognised by their keys.

    The sizes of the models are those of the tensors; nothing is allocated. Raises UserError for a list of no
    component that we know.
    """
    listings = {path: Listing(path) for path in paths}
    components = {path: _component(listing) for path, listing in listings.items()}
    plans = []
    for path, listing in listings.items():
        if (name := components[path]) != "lora":
            config = _CONFIGS[name](listing.infos)
            model = jax.eval_shape(lambda name=name, config=config: make_component(name, config))
            plans.append(make_plan(name, listing.infos, RULES[name], model))
            continue
        transformer = next((listings[other] for other in paths if components[other] == "dit"), None)
        base = None if transformer is None else {k: info.shape for k, info in transformer.infos.items()}
        tensors = LazyTensors(listing)
        pairs = read_lora(tensors, base, source=str(path))
        plans.append(_lora_plan(listing, pairs, list(extra_keys(tensors, base).values())))
    return plans


def _component(listing: Listing) -> str:
    marks = {
        "lora": lambda key: ".lora" in key,
        "dit": lambda key: key == "patch_embedding.weight",
        "vae": lambda key: key == "encoder.conv1.weight",
        "text": lambda key: key == "token_embedding.weight",
        "speech": lambda key: key.startswith("wav2vec2."),
    }
    for name, mark in marks.items():
        if any(mark(key) for key in listing.infos):
            return name
    raise UserError(f"{listing.files[0]} lists the tensors of no component that is known")


def _lora_plan(tensors: Tensors, pairs: Mapping[str, LoraPair], whole: list[str]) -> Plan:
    keys = [key for pair in pairs.values() for key in (pair.a_key, pair.b_key, pair.alpha_key) if key] + whole
    infos = [tensors.infos[key] for key in keys]
    return Plan(
        component="lora",
        leaves=(),
        mapped=tuple(keys),
        dropped=(),
        missing=(),
        unexpected=tuple(f"{tensors.files[0]}: {key}" for key in tensors.infos if key not in keys),
        mismatched=(),
        parameters=sum(info.nbytes // info.dtype.itemsize for info in infos),
        nbytes=sum(info.nbytes for info in infos),
    )
