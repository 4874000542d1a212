"""The text encoder: position buckets, padding, bf16, the published sizes, and the original library."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.checkpoints.convert import Rule, convert, export, param_paths
from lavatar_jax.checkpoints.tables_umt5 import UMT5_RULES, UMT5_TRANSFORMERS_RULES
from lavatar_jax.models.umt5 import UMT5Config, UMT5Encoder, position_bias, position_buckets
from tests.shared import shared_path
from tests.tiny import random_umt5

CONFIG = UMT5Config(vocabulary=50, width=16, attention_width=8, ffn_width=20, layers=3, heads=4)
encode = jax.jit(UMT5Encoder.__call__)


def abstract(config: UMT5Config) -> UMT5Encoder:
    return jax.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))


def encoder() -> UMT5Encoder:
    return random_umt5(CONFIG)


def batch(length: int = 12, lengths: tuple[int, ...] = (12, 5)) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(2, 50, (len(lengths), length)).astype(np.int32)
    return ids, np.arange(length) < np.array(lengths)[:, None]


# Position bias


def test_buckets_are_single_distances_then_growing_ranges() -> None:
    row = position_buckets(400, 32, 128)[:, 0]  # from each query back to the first key
    assert row[:8].tolist() == list(range(8))
    starts = [int(np.flatnonzero(row == bucket)[0]) for bucket in range(8, 16)]
    assert starts == [8, 12, 16, 23, 32, 46, 64, 91]  # 8 * 16 ** (n / 8), rounded up
    assert (row[91:] == 15).all()


def test_keys_after_the_query_have_buckets_of_their_own() -> None:
    buckets = position_buckets(200, 32, 128)
    assert (np.diag(buckets) == 0).all()
    after = np.triu_indices(200, 1)
    np.testing.assert_array_equal(buckets[after], buckets.T[after] + 16)
    assert np.unique(buckets).tolist() == [*range(16), *range(17, 32)]


def test_the_bias_depends_on_the_distance_alone() -> None:
    table = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    bias = np.asarray(position_bias(jnp.asarray(table, jnp.bfloat16), 128, 40))
    assert bias.shape == (3, 40, 40)
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias[:, 1:, 1:], bias[:, :-1, :-1])
    np.testing.assert_allclose(bias[:, 3, 7], table[16 + 4], rtol=1e-2)


# The encoder


def test_padding_changes_nothing() -> None:
    ids, mask = batch()
    states = encode(encoder(), ids, mask)
    other = np.where(mask, ids, (ids + 7) % 50)
    np.testing.assert_array_equal(encode(encoder(), other, mask)[1, :5], states[1, :5])
    alone = encode(encoder(), ids[1:, :5], mask[1:, :5])
    np.testing.assert_allclose(alone[0], states[1, :5], atol=1e-5)
    assert np.isfinite(states).all()


def test_order_matters_in_both_directions() -> None:
    ids, mask = batch()
    states = np.asarray(encode(encoder(), ids, mask))
    for changed in (0, 11):
        other = ids.copy()
        other[0, changed] = 1
        difference = np.abs(np.asarray(encode(encoder(), other, mask)) - states).max(axis=-1)
        assert (difference[0] > 1e-4).all()
        assert (difference[1] == 0).all()
    swapped = np.asarray(encode(encoder(), ids[:1, [1, 0, *range(2, 12)]], mask[:1]))
    assert np.abs(swapped[0, 0] - states[0, 1]).max() > 1e-2


def test_bf16_stays_near_float32() -> None:
    ids, mask = batch()
    want = np.asarray(encode(encoder(), ids, mask))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder())
    got = encode(half, ids, mask)
    assert got.dtype == jnp.bfloat16
    difference = (np.asarray(got, np.float32) - want)[mask]
    assert 0 < np.linalg.norm(difference) / np.linalg.norm(want[mask]) < 0.04
    # What remains is the rounding of weights and products: norms, logits, softmax and GELU are float32.
    text = str(jax.make_jaxpr(UMT5Encoder.__call__)(half, ids, mask))
    for operation in ("exp", "rsqrt", "reduce_max", "tanh"):
        dtypes = re.findall(rf":(\w+)\[[\d,]*\] = {operation}\b", text)
        assert dtypes
        assert set(dtypes) == {"f32"}, operation
    logits = r":(\w+)\[2,4,12,(?:1,)?12\] = dot_general"
    assert set(re.findall(logits, text)) == {"f32"}


def test_a_fresh_encoder_keeps_unit_variance() -> None:
    fresh = UMT5Encoder(dataclasses.replace(CONFIG, layers=1), rngs=nnx.Rngs(0))
    states = encode(fresh, *batch())
    assert states.shape == (2, 12, CONFIG.width)
    assert 0.5 < float(jnp.std(states)) < 2


@pytest.mark.parametrize(
    "sizes", [{"attention_width": 10}, {"buckets": 6}, {"max_distance": 8}], ids=lambda s: next(iter(s))
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        dataclasses.replace(CONFIG, **sizes)


# Published weights


def test_every_tensor_of_the_published_file_finds_its_place() -> None:
    """The table on the list of real keys and shapes; nothing of that size is allocated."""
    manifest = json.loads(shared_path("manifests/umt5_xxl_encoder.json").read_text())
    leaves = param_paths(abstract(UMT5Config()))
    assert len(manifest) == 242
    found: dict[tuple[str, int | None], str] = {}
    for key, (shape, _) in manifest.items():
        matches = [(rule, match) for rule in UMT5_RULES if (match := re.fullmatch(rule.pattern, key))]
        assert len(matches) == 1, key
        rule, match = matches[0]
        assert rule.path is not None
        leaf = leaves[rule.path].shape
        tensor = rule.resolve_transform().forward(np.broadcast_to(np.float16(0), shape))
        assert tensor.shape == (leaf[1:] if rule.stacked else leaf), key
        assert found.setdefault((rule.path, int(match["layer"]) if rule.stacked else None), key) == key
    stacked = {rule.path for rule in UMT5_RULES if rule.stacked}
    assert found.keys() == {
        (path, layer) for path in leaves for layer in (range(24) if path in stacked else [None])
    }
    assert sum(leaf.size for leaf in leaves.values()) == 5_680_910_336


@pytest.mark.parametrize("rules", [UMT5_RULES, UMT5_TRANSFORMERS_RULES], ids=["wan", "transformers"])
def test_export_gives_the_tensors_back(rules: list[Rule]) -> None:
    tensors = export(encoder(), rules)
    assert len(tensors) == 2 + 10 * CONFIG.layers
    again = convert(tensors, rules, abstract(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, again, encoder())


def test_the_recorded_key_map_joins_both_tables() -> None:
    key_map = json.loads(shared_path("golden/10_umt5_encoder/case.json").read_text())["transformers_key_map"]
    wan, hugging_face = (export(encoder(), rules) for rules in (UMT5_RULES, UMT5_TRANSFORMERS_RULES))
    key_map.pop("encoder.embed_tokens.weight")  # the same tensor as shared.weight
    assert key_map.keys() == hugging_face.keys()
    for theirs, ours in key_map.items():
        np.testing.assert_array_equal(hugging_face[theirs], wan[ours])


@pytest.mark.filterwarnings("ignore")  # those of another library
def test_transformers_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=CONFIG.vocabulary, d_model=CONFIG.width, d_ff=CONFIG.ffn_width, num_heads=CONFIG.heads,
            d_kv=CONFIG.attention_width // CONFIG.heads, num_layers=CONFIG.layers,
        )
    ).eval()  # fmt: skip
    tensors = export(encoder(), UMT5_TRANSFORMERS_RULES)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    theirs.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in tensors.items()})
    ids, mask = batch(150, (150, 40))  # beyond the largest distance
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())[0].numpy()
    ours = convert(tensors, UMT5_TRANSFORMERS_RULES, abstract(CONFIG))
    got = np.asarray(encode(ours, ids, mask))
    np.testing.assert_allclose(got[mask], want[mask], rtol=1e-4, atol=1e-5)
