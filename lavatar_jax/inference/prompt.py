"""A prompt becomes the text states that the transformer attends to (reference behaviour 8)."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from lavatar_jax.errors import UserError
from lavatar_jax.models.umt5 import UMT5Encoder

PAD, END = "<pad>", "</s>"

_encode = jax.jit(UMT5Encoder.__call__)


def clean_prompt(text: str) -> str:
    """Broken encodings repaired, HTML entities resolved (twice, for `&amp;amp;`), single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """Cleans prompts and splits them into `length` token ids: the prompt, `</s>`, padding.

    `folder` is the published `google/umt5-xxl`; of it, `tokenizer.json` is read. Where there is only a
    `spiece.model`, the sentencepiece package reads that. Raises UserError if neither can be read.
    """

    def __init__(self, folder: Path, length: int = 512) -> None:
        if length < 1:
            raise ValueError(f"a prompt needs room for its end: length {length}")
        self.length = length
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            self._ids, self._pad = _read_tokenizer_json(folder / "tokenizer.json", length)
        elif (folder / "spiece.model").is_file():
            self._ids, self._pad = _read_sentencepiece(folder / "spiece.model", length)
        else:
            raise UserError(
                f"{folder}: no tokenizer.json in this folder; copy it there from google/umt5-xxl of the "
                "published checkpoint"
            )

    def __call__(self, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"]]:
        """Prompts -> ids int32 and mask (True: a token of the prompt or its end).

        Of a prompt that is too long, the end is cut off, and `</s>` kept.
        """
        ids = np.full((len(prompts), self.length), self._pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            tokens = self._ids(clean_prompt(prompt))
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask


Ids = Callable[[str], list[int]]


def _read_tokenizer_json(path: Path, length: int) -> tuple[Ids, int]:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path} is not a tokenizer file ({error}); copy it again") from None
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    if end is None or pad is None:
        raise UserError(
            f"{path} has no token {PAD} or {END}: it is not umT5's; copy the one of google/umt5-xxl"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return lambda text: tokenizer.encode(text).ids, pad


def _read_sentencepiece(path: Path, length: int) -> tuple[Ids, int]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(
            f"{path.parent} has a spiece.model but no tokenizer.json: copy that there from google/umt5-xxl "
            "of the published checkpoint, or pip install sentencepiece"
        ) from None
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a sentencepiece model ({error}); copy it again") from None
    end, pad = pieces.piece_to_id(END), pieces.piece_to_id(PAD)
    if pieces.unk_id() in (end, pad):
        raise _not_umt5(path)
    return lambda text: [*pieces.encode(text)[: length - 1], end], pad


def _not_umt5(path: Path) -> UserError:
    return UserError(f"{path} has no token {PAD} or {END}, so it is not umT5's; copy it from google/umt5-xxl")


def encode_prompt(
    encoder: UMT5Encoder, tokenizer: PromptTokenizer, prompt: str, length: int
) -> Float[Array, "1 S E"]:
    """The states of a prompt in float32, [1, length, width], zero beyond its true length.

    The transformer was trained with these zeros and attends to them. `length` is the transformer's
    `text_len` and at least the tokeniser's length. Raises UserError if the tokeniser has ids that the
    encoder has not.
    """
    if length < tokenizer.length:
        raise ValueError(f"prompts of {tokenizer.length} tokens do not fit into {length}")
    ids, mask = tokenizer([prompt])
    if ids.max() >= encoder.config.vocabulary:
        raise UserError(
            f"the tokenizer gives id {ids.max()}, the text encoder has {encoder.config.vocabulary} rows: "
            "they are not of one model; copy both from the same checkpoint"
        )
    states = _encode(encoder, jnp.asarray(ids), jnp.asarray(mask)).astype(jnp.float32)
    states = jnp.where(mask[..., None], states, 0)
    return jnp.pad(states, ((0, 0), (0, length - tokenizer.length), (0, 0)))
