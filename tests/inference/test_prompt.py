"""From what somebody typed to text states: cleaning, token ids, and the zeros behind them."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lavatar_jax.errors import UserError
from lavatar_jax.inference import prompt as prompt_module
from lavatar_jax.inference.prompt import PromptTokenizer, clean_prompt, encode_prompt
from lavatar_jax.models.umt5 import UMT5Config, UMT5Encoder
from tests import published
from tests.tiny import random_umt5

CONFIG = UMT5Config(vocabulary=128, width=8, attention_width=8, ffn_width=12, layers=2, heads=2)
END, UNKNOWN = 1, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("umt5-xxl")
    published.write_tokenizer(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "umt5-xxl"))


@pytest.fixture
def encoder() -> UMT5Encoder:
    return random_umt5(CONFIG)


# Cleaning


@pytest.mark.parametrize(
    ("typed", "clean"),
    [
        ("  A\twoman \n\n talking  ", "A woman talking"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("&amp;nbsp;quiet", "quiet"),
        ("voilÃ  une cafÃ©tiÃ¨re", "voilà une cafétière"),
        ("\u201ccurly\u201d \ufb01ne", '"curly" fine'),
        ("一个人在说话。", "一个人在说话。"),
        (" \n ", ""),
    ],
)
def test_prompts_are_cleaned(typed: str, clean: str) -> None:
    assert clean_prompt(typed) == clean


@given(st.text(max_size=40))
def test_clean_prompts_have_single_spaces(text: str) -> None:
    clean = clean_prompt(text)
    assert clean == " ".join(clean.split())


# Token ids


def test_a_prompt_is_tokens_an_end_and_padding(folder: Path) -> None:
    ids, mask = PromptTokenizer(folder, 12)(["a  person talking", ""])
    pieces = [piece for piece, _ in published.pieces()]
    words = [pieces.index(word) for word in ("▁a", "▁person", "▁talking")]
    assert ids.dtype == np.int32
    assert ids.tolist() == [[*words, END] + [0] * 8, [END] + [0] * 11]
    np.testing.assert_array_equal(mask, np.arange(12) < np.array([[4], [1]]))


def test_the_default_is_512_tokens(folder: Path) -> None:
    ids, mask = PromptTokenizer(folder)(["the " * 2000])
    assert ids.shape == mask.shape == (1, 512)
    assert mask.all()
    assert ids[0, -1] == END
    assert (ids[0, :-1] != END).all()


def test_settings_stored_in_the_file_are_overruled(folder: Path, copy: Path) -> None:
    path = copy / "tokenizer.json"
    values = json.loads(path.read_text())
    values["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 5,
        "pad_type_id": 0, "pad_token": "x",
    }  # fmt: skip
    path.write_text(json.dumps(values))
    prompts = ["the person is smiling", "a " * 20]
    for got, want in zip(PromptTokenizer(copy, 9)(prompts), PromptTokenizer(folder, 9)(prompts), strict=True):
        np.testing.assert_array_equal(got, want)


@given(prompt=st.text(max_size=60), length=st.integers(1, 12))
def test_any_prompt_fits(folder: Path, prompt: str, length: int) -> None:
    ids, mask = PromptTokenizer(folder, length)([prompt])
    count = int(mask.sum())
    assert ids.shape == (1, length)
    assert 1 <= count <= length
    assert mask[0, :count].all()
    assert ids[0, count - 1] == END
    assert (ids[0, count:] == 0).all()


def test_sentencepiece_reads_the_other_file(copy: Path) -> None:
    pytest.importorskip("sentencepiece")
    prompts = ["A person talking, smiling", "", "the " * 40, "naïve 人"]
    want = PromptTokenizer(copy, 16)(prompts)
    (copy / "tokenizer.json").unlink()
    got = PromptTokenizer(copy, 16)(prompts)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    assert UNKNOWN in got[0][3]


def problem(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        PromptTokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_tokenizer_says_what_to_copy(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (copy / "tokenizer.json").unlink()
    assert "spiece.model but no tokenizer.json" in problem(copy)
    (copy / "spiece.model").unlink()
    text = problem(copy)
    assert f"{copy}: no tokenizer.json" in text
    assert "google/umt5-xxl" in text
    assert "no tokenizer.json" in problem(copy / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    if name == "spiece.model":
        pytest.importorskip("sentencepiece")
        (copy / "tokenizer.json").unlink()
    whole = (copy / name).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff\xfe no such thing"):
        (copy / name).write_bytes(damaged)
        assert str(copy / name) in problem(copy)


def test_another_models_tokenizer_is_refused(copy: Path) -> None:
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("</s>", "<eos>"))
    assert "not umT5's" in problem(copy)


# States


def test_states_are_those_of_the_tokens_then_zeros(folder: Path, encoder: UMT5Encoder) -> None:
    prompt = "a person talking"
    states = np.asarray(encode_prompt(encoder, PromptTokenizer(folder, 16), prompt, 20))
    ids, mask = PromptTokenizer(folder, 4)([prompt])
    assert mask.all()
    assert states.shape == (1, 20, CONFIG.width)
    assert states.dtype == np.float32
    np.testing.assert_allclose(states[:, :4], encoder(jnp.asarray(ids), jnp.asarray(mask)), atol=1e-5)
    assert (states[:, :4] != 0).any(axis=-1).all()
    assert (states[:, 4:] == 0).all()


def test_prompts_of_all_lengths_share_one_program(folder: Path, encoder: UMT5Encoder) -> None:
    tokenizer = PromptTokenizer(folder, 24)
    encode_prompt(encoder, tokenizer, "", 24)
    before = prompt_module._encode._cache_size()
    for prompt in ("the", "a person is smiling and talking"):
        encode_prompt(encoder, tokenizer, prompt, 24)
    assert prompt_module._encode._cache_size() == before


def test_bf16_states_come_as_float32(folder: Path, encoder: UMT5Encoder) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder)
    tokenizer = PromptTokenizer(folder, 8)
    got, want = (encode_prompt(model, tokenizer, "a person", 8) for model in (half, encoder))
    assert got.dtype == jnp.float32
    assert 0 < float(jnp.abs(got - want).max()) < 0.1


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(folder: Path) -> None:
    small = UMT5Config(vocabulary=6, width=8, attention_width=8, ffn_width=12, layers=2, heads=2)
    encoder = jax.eval_shape(lambda: UMT5Encoder(small, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="text encoder has 6 rows"):
        encode_prompt(encoder, PromptTokenizer(folder, 8), "zebra", 8)


def test_a_prompt_must_fit_the_transformer(folder: Path, encoder: UMT5Encoder) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        encode_prompt(encoder, PromptTokenizer(folder, 8), "a", 7)
    with pytest.raises(ValueError, match="length 0"):
        PromptTokenizer(folder, 0)
