"""A text encoder that stays: what it reads is remembered, within bounds, and read once."""

import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lavatar_jax.inference import prompt, prompt_reader
from lavatar_jax.inference.prompt_reader import PromptDesk, PromptReader
from tests.inference.test_portrait import CONFIG


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that an encoder has seen."""
    found: list[str] = []

    def encode(encoder: str, tokenizer: str, words: str, length: int) -> jnp.ndarray:
        assert (encoder, length) == ("the encoder", CONFIG.dit.text_len)
        time.sleep(0.02)  # others come meanwhile
        found.append(words)
        return jnp.full((1, length, 2), float(len(words)))

    monkeypatch.setattr(prompt, "PromptTokenizer", lambda folder, length: folder)
    monkeypatch.setattr(prompt, "encode_prompt", encode)
    monkeypatch.setattr(prompt_reader, "load_text_encoder", lambda folder, config: "the encoder")
    return found


def test_a_prompt_is_read_once_and_forgotten_in_the_end(read: list[str]) -> None:
    reader = PromptReader(Path("model"), CONFIG)
    for words in ("one", "three", "one"):
        np.testing.assert_array_equal(reader(words), np.full((1, 4, 2), len(words), np.float32))
    assert read == ["one", "three"]
    for number in range(prompt_reader.KEPT - 1):
        reader(f"{number}")
    reader("one")
    assert read.count("one") == 1
    reader("three")
    assert read.count("three") == 2


def test_sessions_that_open_together_read_a_prompt_once(read: list[str]) -> None:
    reader = PromptReader(Path("model"), CONFIG)
    threads = [threading.Thread(target=reader, args=("hello",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == ["hello"]


def test_states_need_no_reading() -> None:
    states = jnp.zeros((1, 4, 2))
    assert PromptDesk(None).read(states).result() is states
