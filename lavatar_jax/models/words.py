"""A prompt encoder without weights: every word is a fixed random vector drawn from the hash of its letters.

The small model's prompts use few words, so the DiT's own text embedding learns what each vector means. It
stands where umT5 stands in the large model and gives the same kind of output.
"""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np
from jaxtyping import Float


@functools.lru_cache(maxsize=4096)
def word_vector(word: str, dim: int) -> Float[np.ndarray, " dim"]:
    """Unit-variance normal vector of a word; the same on every machine and for ever."""
    digest = hashlib.sha256(word.encode()).digest()
    key = np.frombuffer(digest[:16], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(dim).astype(np.float32)


def encode_words(prompt: str, length: int, dim: int) -> Float[np.ndarray, "length dim"]:
    """Vectors of the first `length` words (lower case, letters and digits only), zeros after the last."""
    words = re.findall(r"[^\W_]+", prompt.lower())[:length]
    encoded = np.zeros((length, dim), np.float32)
    for row, word in zip(encoded, words, strict=False):
        row[:] = word_vector(word, dim)
    return encoded
