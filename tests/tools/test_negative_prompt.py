"""The prompt that guidance leads away from, encoded beside the records."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lavatar_jax.data.negative_prompt import NEGATIVE, read_negative
from lavatar_jax.errors import UserError
from tools.prepare_data import keep_negative


def test_a_negative_prompt_lies_beside_the_records_until_another_is_given(tmp_path: Path):
    asked: list[str] = []

    class Reader:
        config = SimpleNamespace(text="a text encoder")

        def read(self, prompt: str) -> np.ndarray:
            asked.append(prompt)
            return np.full((1 + len(prompt), 4), 0.1)

    encoder: Any = Reader()
    for prompt in (None, "", "blurred", None):  # None: what is there
        keep_negative(tmp_path, prompt, encoder)
    assert asked == ["", "blurred"]
    prompt, states = read_negative(tmp_path) or ("", np.zeros(0))
    assert prompt == "blurred"
    np.testing.assert_array_equal(states, np.full((8, 4), 0.1, np.float16), strict=True)

    words: Any = SimpleNamespace(config=SimpleNamespace(text=None))
    keep_negative(tmp_path / "small", "", words)
    assert read_negative(tmp_path / "small") is None
    (tmp_path / NEGATIVE).write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match=r"negative\.npz is damaged"):
        read_negative(tmp_path)
