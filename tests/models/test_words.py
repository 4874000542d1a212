"""Word vectors: fixed for ever, blind to case and punctuation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar_jax.models.words import encode_words, word_vector

PERSON = [-1.1628153324127197, -2.715721368789673, 0.1600245237350464, -0.874671459197998]


def test_vectors_never_change() -> None:
    """A trained model depends on these very numbers."""
    np.testing.assert_allclose(word_vector("person", 4), PERSON, atol=1e-6)
    np.testing.assert_array_equal(word_vector("person", 64)[:4], word_vector("person", 4))


def test_rows_are_words_then_zeros() -> None:
    encoded = encode_words("A man, speaking!", 5, 8)
    assert encoded.shape == (5, 8)
    assert encoded.dtype == np.float32
    for row, word in zip(encoded, ["a", "man", "speaking"], strict=False):
        np.testing.assert_array_equal(row, word_vector(word, 8))
    assert (encoded[3:] == 0).all()


@pytest.mark.parametrize("prompt", ["a woman in red", "A  Woman in RED.", "a-woman_in (red)\n"])
def test_case_spaces_and_punctuation_do_not_matter(prompt: str) -> None:
    np.testing.assert_array_equal(encode_words(prompt, 6, 8), encode_words("a woman in red", 6, 8))


def test_letters_of_any_script_and_digits_are_words() -> None:
    encoded = encode_words("naïve 人 42", 4, 8)
    for row, word in zip(encoded, ["naïve", "人", "42"], strict=False):
        np.testing.assert_array_equal(row, word_vector(word, 8))


def test_words_have_unit_variance_and_are_nearly_orthogonal() -> None:
    vectors = np.stack([word_vector(f"word{i}", 512) for i in range(40)])
    cosines = vectors @ vectors.T / 512
    np.testing.assert_allclose(np.diag(cosines), 1, atol=0.3)
    assert np.abs(cosines - np.diag(np.diag(cosines))).max() < 0.25


@given(prompt=st.text(max_size=200), length=st.integers(1, 8))
def test_any_prompt_fits(prompt: str, length: int) -> None:
    encoded = encode_words(prompt, length, 4)
    assert encoded.shape == (length, 4)
    filled = (encoded != 0).any(axis=1)
    assert (np.sort(filled)[::-1] == filled).all()


def test_long_prompts_lose_their_end() -> None:
    np.testing.assert_array_equal(encode_words("one two three", 2, 8), encode_words("one two", 2, 8))


def test_the_cached_vector_is_not_handed_out_for_writing() -> None:
    encode_words("hello", 2, 4)[:] = 0
    assert (word_vector("hello", 4) != 0).all()
