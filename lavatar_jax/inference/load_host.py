"""From options of a command line to a session host, in two steps: what can be wrong, then what is slow."""

from __future__ import annotations

from collections.abc import Callable

from lavatar_jax.checkpoints.store import load_config, load_model_folder, model_folder
from lavatar_jax.errors import UserError
from lavatar_jax.inference.prompt_reader import PromptReader
from lavatar_jax.inference.session_host import SessionHost
from lavatar_jax.parallel import claim_devices


def prepare_host(model: str, devices: int) -> Callable[[int], SessionHost]:
    """Checks --model and --devices, as of generate -> a function that loads the model, with so many places.

    Raises UserError, as the function does for damaged weights.
    """
    folder = model_folder(model)
    config = load_config(folder)
    if (reason := config.sampling.why_no_pipeline) is not None:
        raise UserError(
            f"the model {model} cannot talk live: {reason} (`sampling` in its config.json); "
            "use generate, on one device"
        )
    layout = claim_devices(devices, config.sampling.steps)

    def load(slots: int) -> SessionHost:
        encode = None if config.text is None else PromptReader(folder, config)
        return SessionHost(load_model_folder(folder), slots, layout, encode_prompt=encode)

    return load
