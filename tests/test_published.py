"""The fixture itself: its names, layouts and dtypes are those of the published files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests import published
from tests.shared import shared_path


@pytest.mark.parametrize(
    ("manifest", "shapes"),
    [
        ("wan22_s2v_14b_dit", published.dit_shapes()),
        ("wan21_vae", published.vae_shapes()),
        ("umt5_xxl_encoder", published.text_shapes()),
        (
            "wav2vec2_large_xlsr53",
            published.speech_shapes(
                ("parametrizations.weight.original0", "parametrizations.weight.original1")
            ),
        ),
        ("liveavatar_lora", published.lora_shapes()),
    ],
)
def test_names_and_axes_are_those_of_the_real_files(manifest: str, shapes: published.Shapes) -> None:
    """With layer numbers left out, since there are fewer: each name has as many axes as the real one."""

    def patterns(axes: dict[str, int]) -> dict[str, int]:
        return {re.sub(r"\.\d+\.", ".#.", key): count for key, count in axes.items()}

    real = json.loads(shared_path(f"manifests/{manifest}.json").read_text())
    assert patterns({key: len(shape) for key, shape in shapes.items()}) == patterns(
        {key: len(shape) for key, (shape, _) in real.items()}
    )


def test_what_is_written_is_what_was_drawn(tmp_path: Path) -> None:
    made = published.write_published(tmp_path)
    index = json.loads((made.wan / published.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 4
    read = {}
    for file in files:
        with safe_open(made.wan / file, "np") as shard:
            read |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in read.values())
    assert set(read) == set(made.dit)
    for key, tensor in made.dit.items():
        np.testing.assert_array_equal(read[key], tensor, err_msg=key)
    for tensors in (made.dit, made.vae, made.text, made.speech, made.adapters):
        for key, tensor in tensors.items():
            assert np.isfinite(tensor).all(), key
            assert np.count_nonzero(tensor) > 0.99 * tensor.size, key


def test_the_tokeniser_ends_prompts_and_knows_every_row(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    published.write_tokenizer(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("A person talking, smiling").ids
    assert ids[-1] == 1
    assert 3 not in ids
    assert tokenizer.decode(ids) == "A person talking, smiling"
    assert tokenizer.get_vocab_size() <= published.text_shapes()["token_embedding.weight"][0]
