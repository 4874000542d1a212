"""LoRA files: every spelling gives the same pairs, the merge is the recorded one, and nothing is ignored."""

import json
import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lavatar_jax.checkpoints.lora_keys import LoraPair, base_key, extra_keys, merged, read_lora
from lavatar_jax.errors import UserError
from tests.shared import golden, shared_path

SPELLINGS = {
    "peft": ("base_model.model.{}", ".lora_{}.default.weight", "AB"),
    "peft without prefix": ("{}", ".lora_{}.default.weight", "AB"),
    "peft without adapter": ("base_model.model.{}", ".lora_{}.weight", "AB"),
    "plain": ("{}", ".lora_{}.weight", "AB"),
    "diffusion_model": ("diffusion_model.{}", ".lora_{}.weight", "AB"),
    "two prefixes": ("model.diffusion_model.{}", ".lora_{}.my-adapter.weight", "AB"),
    "down up": ("{}", ".lora_{}.weight", ("down", "up")),
    "dotted down up": ("transformer.{}", ".lora.{}.weight", ("down", "up")),
    "kohya": ("lora_unet_{}", ".lora_{}.weight", ("down", "up")),
    "kohya, two underscores": ("lora_unet__{}", ".lora_{}.weight", ("down", "up")),
}


def spelt(
    adapters: dict[str, np.ndarray], spelling: str, alpha: float | None = None
) -> dict[str, np.ndarray]:
    """The recorded adapters (`<module>.lora_A.default.weight`) under other names."""
    prefix, suffix, sides = SPELLINGS[spelling]
    flat = "kohya" in spelling
    tensors = {}
    for key, value in adapters.items():
        module, side = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", key).groups()
        module = prefix.format(module.replace(".", "_") if flat else module)
        tensors[module + suffix.format(sides["AB".index(side)])] = value
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.float32(alpha)
    return tensors


def pair_of(a: np.ndarray, b: np.ndarray, alpha: float | None = None) -> LoraPair:
    tensors = {"a": a, "b": b, "alpha": alpha}
    return LoraPair(tensors, "a", "b", None if alpha is None else "alpha")


def adapter(module: str = "blocks.0.self_attn.q", rank: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{module}.lora_A.weight": rng.normal(size=(rank, 6)).astype(np.float32),
        f"{module}.lora_B.weight": rng.normal(size=(4, rank)).astype(np.float32),
    }


def problem_of(tensors, base=None) -> str:
    with pytest.raises(UserError) as caught:
        read_lora(tensors, base, source="some.safetensors")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("some.safetensors does not fit the model: ")
    return str(caught.value)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_recorded_adapter_merges_to_the_recorded_weights(spelling: str) -> None:
    info, adapters, want = golden("13_lora_merge")
    weights = load_file(shared_path("golden/13_lora_merge/weights.safetensors"))
    # The scale is alpha / rank of the file, or else the given one: wrong values must not be used.
    with_alpha = read_lora(spelt(adapters, spelling, alpha=info["alpha"]))
    without = read_lora(spelt(adapters, spelling))
    assert sorted(with_alpha) == sorted(without) == info["matched_modules"]
    assert {pair.rank for pair in with_alpha.values()} == {info["rank"]}
    assert len(want) == 8
    for key in want:
        module = key.removesuffix(".weight")
        for pair, default in ((with_alpha[module], 77.0), (without[module], info["scaling"])):
            np.testing.assert_allclose(
                merged(weights[key], pair, default), want[key], rtol=1e-5, atol=1e-6, err_msg=key
            )


def test_the_published_adapter_fits_the_published_model() -> None:
    """By shapes and dtypes alone: nothing is read."""

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        entries = json.loads(shared_path(f"manifests/{name}.json").read_text())
        return {key: tuple(shape) for key, (shape, _) in entries.items()}

    lora = {
        key: SimpleNamespace(shape=shape, dtype=np.dtype(np.float32))
        for key, shape in shapes("liveavatar_lora").items()
    }
    pairs = read_lora(lora, shapes("wan22_s2v_14b_dit"))
    assert len(lora) == 2 * len(pairs) == 896
    assert {pair.rank for pair in pairs.values()} == {128}
    assert {pair.scale() for pair in pairs.values()} == {0.5}


def test_a_merge_is_rounded_once_and_leaves_its_operands_alone() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(2500, 3)).astype(np.float32)
    weight = rng.normal(size=(2500, 5)).astype(ml_dtypes.bfloat16)
    kept = b.copy(), weight.copy()
    got = merged(weight, pair_of(a, b, alpha=6.0))
    assert got.dtype == ml_dtypes.bfloat16
    exact = weight.astype(np.float64) + 2.0 * b.astype(np.float64) @ a
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=2.0**-8, atol=1e-6)
    assert (got == exact.astype(ml_dtypes.bfloat16)).mean() > 0.999  # float32 ties aside
    np.testing.assert_array_equal(b, kept[0])
    np.testing.assert_array_equal(weight, kept[1])
    with pytest.raises(ValueError, match=r"of a weight \[2500, 5\] on a weight \[5, 2500\]"):
        merged(weight.T, pair_of(a, b))


def test_matrices_are_read_when_they_are_used() -> None:
    class Lazy(dict):
        def __init__(self, tensors) -> None:
            super().__init__({key: self.Tensor(value) for key, value in tensors.items()})

        class Tensor:
            def __init__(self, value: np.ndarray) -> None:
                self.value, self.shape, self.dtype, self.reads = value, value.shape, value.dtype, 0

            def __array__(self, dtype=None, copy=None) -> np.ndarray:
                self.reads += 1
                return self.value

    tensors = Lazy(adapter())
    (pair,) = read_lora(tensors).values()
    assert [tensor.reads for tensor in tensors.values()] == [0, 0]
    merged(np.zeros((4, 6), np.float32), pair)
    assert [tensor.reads for tensor in tensors.values()] == [1, 1]


def test_a_file_without_a_pair_is_an_error() -> None:
    assert "none of its 0 tensors belongs to a LoRA pair" in problem_of({})
    assert "none of its 1 tensors" in problem_of({"blocks.0.self_attn.q.weight": np.zeros((4, 4))})


def test_everything_that_is_wrong_is_named_in_one_line() -> None:
    half, ranks, flat = (adapter(f"blocks.{layer}.ffn.0") for layer in range(3))
    del half["blocks.0.ffn.0.lora_B.weight"]
    ranks["blocks.1.ffn.0.lora_A.weight"] = np.zeros((3, 6))
    flat["blocks.2.ffn.0.lora_B.weight"] = np.zeros(8)
    same = adapter() | {"base_model.model.blocks.0.self_attn.q.lora_A.default.weight": np.zeros((2, 6))}
    foreign = adapter("encoder.layer.3.q") | adapter("lora_unet_down_blocks_0_attn")
    text = problem_of({**half, **ranks, **flat, **same, **foreign, "mystery.weight": np.zeros(3)})
    assert text.count(";") == 6
    assert "unknown key mystery.weight" in text
    assert "blocks.0.ffn.0 has no matrix B (up)" in text
    assert "A [3, 6] and B [4, 2] of blocks.1.ffn.0" in text
    assert "A [2, 6] and B [8] of blocks.2.ffn.0" in text
    assert "are the same matrix" in text
    assert "no linear layer encoder.layer.3.q (key encoder.layer.3.q.lora_A.weight)" in text
    assert "no linear layer lora_unet_down_blocks_0_attn" in text
    many = {f"mystery.{number}": np.zeros(1) for number in range(100)}
    assert problem_of(many).count("mystery") == 8
    assert "and 92 more" in problem_of(many)
    assert "has no matrix A (down) and B (up)" in problem_of({"blocks.0.ffn.0.alpha": np.float32(1)})


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_numbers_whose_scale_is_elsewhere_are_refused(dtype: type) -> None:
    tensors = adapter() | {"patch_embedding.bias": np.ones(3, np.float32)}
    name = np.dtype(dtype).name
    for key in tensors:
        text = problem_of(tensors | {key: tensors[key].astype(dtype)})
        assert f"{key} has dtype {name}, " in text
        assert text.count(name) == 1
    for known in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        assert len(read_lora({key: value.astype(known) for key, value in tensors.items()})) == 1
    assert len(read_lora(tensors | {"blocks.0.self_attn.q.alpha": np.int64(2)})) == 1


def test_pairs_must_fit_the_weights_of_the_model() -> None:
    key, other = "blocks.0.self_attn.q.weight", "blocks.1.self_attn.q"
    assert len(read_lora(adapter(), {key: (4, 6)})) == 1
    assert "weight [4, 6], the model's is [6, 4]" in problem_of(adapter(), {key: (6, 4)})
    assert f"no linear layer {other}" in problem_of(adapter(other), {key: (4, 6)})


def test_whole_tensors_of_the_model_are_counted_and_not_lost() -> None:
    extra = {
        "base_model.model.patch_embedding.bias": np.zeros(3),
        "base_model.model.blocks.0.self_attn.q.base_layer.weight": np.zeros((4, 6)),
    }
    tensors = adapter() | extra
    assert len(read_lora(tensors)) == 1
    names = {
        "patch_embedding.bias": "base_model.model.patch_embedding.bias",
        "blocks.0.self_attn.q.weight": "base_model.model.blocks.0.self_attn.q.base_layer.weight",
    }
    assert extra_keys(tensors) == names
    assert base_key("blocks.0.norm3.weight", {"patch_embedding.bias": (3,)}) is None
    base = {"patch_embedding.bias": (3,), "blocks.0.self_attn.q.weight": (4, 6)}
    assert extra_keys(tensors, base) == names
    del base["patch_embedding.bias"]
    assert "unknown key base_model.model.patch_embedding.bias" in problem_of(tensors, base)
    twice = adapter() | extra | {"patch_embedding.bias": np.ones(3)}
    assert "patch_embedding.bias are the same tensor" in problem_of(twice)
