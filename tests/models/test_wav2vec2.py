import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lavatar_jax.checkpoints.convert import ConversionError, convert, export, param_paths
from lavatar_jax.checkpoints.tables_wav2vec2 import WAV2VEC2_RULES
from lavatar_jax.errors import UserError
from lavatar_jax.models import wav2vec2
from lavatar_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from tests.published import SPEECH_CONFIG, random_tensors, speech_shapes
from tests.shared import shared_path

TINY = Wav2Vec2Config(
    layers=2, width=16, heads=2, ffn_width=24, conv_width=(8,) * 7, position_kernel=8, position_groups=4
)


def make(config=TINY, seed=0):
    return Wav2Vec2(config, rngs=nnx.Rngs(seed))


run = jax.jit(lambda model, samples, valid=None: model(samples, valid))


def noise(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


# Sizes and checkpoints


def test_every_tensor_of_the_published_model_has_its_place():
    """The manifest fills the default configuration exactly, shape by shape; nothing is allocated."""
    manifest = json.loads(shared_path("manifests/wav2vec2_large_xlsr53.json").read_text())
    leaves = param_paths(jax.eval_shape(lambda: make(Wav2Vec2Config())))
    unfilled = {
        (path, layer)
        for path, leaf in leaves.items()
        for layer in (range(leaf.shape[0]) if path.startswith("layers.") else [None])
    }
    for key, (shape, _) in manifest.items():
        ((match, rule),) = [(m, rule) for rule in WAV2VEC2_RULES if (m := re.fullmatch(rule.pattern, key))]
        path, layer = match.expand(rule.path), int(match["layer"]) if rule.stacked else None
        unfilled.remove((path, layer))
        tensor = np.broadcast_to(np.float32(0), shape)  # numbers without memory
        assert rule.resolve_transform().forward(tensor).shape == leaves[path].shape[rule.stacked :], key
    assert len(manifest) == 424
    assert not unfilled
    assert sum(leaf.size for leaf in leaves.values()) == 315_472_545


@pytest.mark.parametrize(
    "names", [("weight_g", "weight_v"), [f"parametrizations.weight.original{i}" for i in (0, 1)]]
)
def test_both_key_styles_of_weight_norm_load_and_go_back(names):
    config = Wav2Vec2Config.from_huggingface(SPEECH_CONFIG)
    tensors = random_tensors(np.random.default_rng(0), speech_shapes(tuple(names)))
    model = convert(tensors, WAV2VEC2_RULES, jax.eval_shape(lambda: make(config)))
    back = export(model, WAV2VEC2_RULES)
    for old, name in zip(("weight_g", "weight_v"), names, strict=True):
        key = "wav2vec2.encoder.pos_conv_embed.conv."
        back[key + name] = back.pop(key + old)  # export writes the published names
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


def test_a_file_with_both_styles_is_refused():
    tensors = random_tensors(np.random.default_rng(0), speech_shapes())
    tensors |= random_tensors(
        np.random.default_rng(0), speech_shapes(("parametrizations.weight.original0", "x"))
    )
    tensors.pop("wav2vec2.encoder.pos_conv_embed.conv.x")
    config = Wav2Vec2Config.from_huggingface(SPEECH_CONFIG)
    with pytest.raises(ConversionError, match=r"position\.length is filled by both"):
        convert(tensors, WAV2VEC2_RULES, jax.eval_shape(lambda: make(config)))


def test_the_published_settings_are_the_defaults():
    published = SPEECH_CONFIG | {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "conv_dim": [512] * 7,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
    }
    assert Wav2Vec2Config.from_huggingface(published) == Wav2Vec2Config()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm"),
        ({"do_stable_layer_norm": None}, "do_stable_layer_norm"),
        ({"feat_extract_norm": "group"}, "feat_extract_norm"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"conv_bias": False}, "conv_bias"),
        ({"architectures": ["Wav2Vec2ForPreTraining"]}, "Wav2Vec2ForPreTraining"),
        ({"model_type": "hubert"}, "hubert"),
        ({"add_adapter": True}, "add_adapter"),
        ({"num_attention_heads": 3}, "heads 3"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"conv_dim": 512}, "conv_dim"),
        ({"conv_dim": [16] * 6}, "conv_width"),
        ({"layer_norm_eps": None}, "layer_norm_eps"),
    ],
)
def test_another_architecture_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=rf"speech/config\.json: .*{named}.*xlsr"):
        Wav2Vec2Config.from_huggingface(SPEECH_CONFIG | change, "speech/config.json")


@pytest.mark.parametrize("missing", ["do_stable_layer_norm", "feat_extract_norm", "conv_bias"])
def test_what_is_not_said_counts_as_transformers_counts_it(missing):
    values = {key: value for key, value in SPEECH_CONFIG.items() if key != missing}
    with pytest.raises(UserError, match=missing):
        Wav2Vec2Config.from_huggingface(values)


# The network


def test_frames_are_25_ms_every_20_ms():
    assert (TINY.window, TINY.stride) == (400, 320)
    assert [TINY.frames(n) for n in (0, 399, 400, 719, 720, 16_000)] == [0, 0, 1, 1, 2, 49]
    states = run(make(), noise(3000)[None])
    assert states.shape == (1, 3, TINY.frames(3000), 16)


def test_equals_transformers_at_small_size():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = SPEECH_CONFIG | {"vocab_size": 20, "num_conv_pos_embeddings": 9}  # an odd kernel pads otherwise
    theirs = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**config)).eval()
    tensors = {
        key: tensor.numpy() * 3 if "attention" in key else tensor.numpy() + 0.02
        for key, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict({key: torch.from_numpy(tensor) for key, tensor in tensors.items()})
    sound = noise(2 * 6000).reshape(2, -1)
    with torch.no_grad():
        body = theirs.wav2vec2(torch.from_numpy(sound), output_hidden_states=True)
        logits = theirs.lm_head(body.last_hidden_state)
    abstract = jax.eval_shape(lambda: make(Wav2Vec2Config.from_huggingface(config)))
    ours = convert(tensors, WAV2VEC2_RULES, abstract)
    states = run(ours, sound)
    # Not every version of transformers puts the final norm on the last of its hidden states.
    want = np.stack([*body.hidden_states[:-1], body.last_hidden_state], axis=1)
    np.testing.assert_allclose(states, want, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(ours.lm_head(states[:, -1]), logits.numpy(), rtol=2e-4, atol=2e-5)


def test_frames_that_do_not_exist_change_nothing():
    model, sound = make(), noise(320 * 20 + 80)
    alone = run(model, sound[None])
    outside = 320 * 5
    padded = np.concatenate([noise(outside, 1), sound, noise(outside, 2)])
    index = jnp.arange(TINY.frames(len(padded)))
    states = run(model, padded[None], (index >= 5) & (index < 25))
    np.testing.assert_allclose(states[:, :, 5:25], alone, rtol=1e-4, atol=1e-5)
    assert (
        np.abs(states[:, :, 5:25] - run(model, padded[None])[:, :, 5:25]).max() > 0.01
    )  # the mask is needed


def test_attention_in_pieces_is_the_same(monkeypatch):
    q, k, v = (jnp.asarray(noise(23 * 8, seed).reshape(1, 23, 2, 4)) for seed in range(3))
    for valid in (None, jnp.arange(23) > 3):
        whole = wav2vec2._attend(q, k, v, valid)
        np.testing.assert_allclose(wav2vec2._attend(q, k, v, valid, piece=5), whole, rtol=1e-5, atol=1e-6)
