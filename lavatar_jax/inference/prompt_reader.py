"""Prompts for as long as a server runs: a model's text encoder stays loaded, and runs beside the pipeline."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavatar_jax.checkpoints.store import load_text_encoder
from lavatar_jax.models.avatar import AvatarConfig

KEPT = 16  # prompts whose states are remembered; 8 MB each for the published model

States = Float[Array, "1 S E"]


class PromptReader:
    """Words -> what `read_prompt` finds in them, again and again. Thread-safe.

    The encoder is loaded here and not freed: nobody who changes a prompt waits until gigabytes are read. The
    published one takes 11 GB on the first device, by its parameters. The last states stay in the memory of
    the host.

    Raises UserError when the model folder's tokenizer or text encoder cannot be read, here and not at the
    first prompt, and ValueError when the model has none.
    """

    def __init__(self, folder: Path, config: AvatarConfig) -> None:
        # Imported only here: small models need neither the tokeniser nor what cleans prompts for it.
        from lavatar_jax.inference.prompt import PromptTokenizer

        self._length = config.dit.text_len
        self._tokenizer = PromptTokenizer(folder / "tokenizer", self._length)
        self._encoder = load_text_encoder(folder, config)
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, prompt: str) -> States:
        from lavatar_jax.inference.prompt import encode_prompt

        with self._lock:  # who asks for the same at the same time waits for the first
            states = self._known.get(prompt)
            if states is None:
                found = encode_prompt(self._encoder, self._tokenizer, prompt, self._length)
                states = self._known[prompt] = np.asarray(found)
            self._known.move_to_end(prompt)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return jnp.asarray(states)


class PromptDesk:
    """New prompts of sessions under way are read in a thread of their own, in the order of their coming, so
    that neither a tick nor who sent one waits for it."""

    def __init__(self, encode: Callable[[str], States]) -> None:
        self._encode = encode
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def read(self, prompt: str | States) -> Future[States]:
        """The states, when they are there; given states are."""
        if isinstance(prompt, str):
            return self._pool.submit(self._encode, prompt)
        given: Future[States] = Future()
        given.set_result(prompt)
        return given
