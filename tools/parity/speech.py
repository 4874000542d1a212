"""Case 11: wav2vec2 and the reference's way from its hidden states to features of video frames."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from lavatar_jax.checkpoints.convert import convert
from lavatar_jax.checkpoints.tables_wav2vec2 import WAV2VEC2_RULES
from lavatar_jax.inference.speech_features import (
    hidden_states,
    normalise,
    pick,
    resample,
    speech_features,
    video_indices,
)
from lavatar_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from tools.parity.case import Case, Check


def wav2vec2(case: Case) -> Iterator[Check]:
    want, tolerance = dict(case.outputs())[""], case.tolerance("float32")
    config = Wav2Vec2Config.from_huggingface(case["config"])
    model = convert(case.weights, WAV2VEC2_RULES, jax.eval_shape(lambda: Wav2Vec2(config, rngs=nnx.Rngs(0))))
    sound, clip_frames, fps = case.inputs["waveform"], case["batch_frames"], case["fps"]
    yield Check("input_values", normalise(sound)[None], want["input_values"], tolerance)
    hidden = hidden_states(model, sound)
    yield Check("hidden", hidden, want["hidden"], tolerance)
    states = resample(hidden, target=case["video_rate"])
    yield Check("feat30", states, want["feat30"], tolerance)

    indices = video_indices(states.shape[1], clip_frames, fps)
    yield Check("bucket_fps_indices", indices, np.array(case["bucket_fps_indices"]), (0.0, 0.0))
    picked = pick(states, indices).swapaxes(0, 1)
    yield Check("bucket_fps", picked, want["bucket_fps"], tolerance)
    around = pick(states, indices, around=1).swapaxes(0, 1)
    yield Check("bucket_fps_m1", around, want["bucket_fps_m1"], tolerance)
    strided = 2 * np.arange(len(want["bucket_m2"]))
    yield Check(
        "bucket_m2", pick(states, strided, around=2, stride=2).swapaxes(0, 1), want["bucket_m2"], tolerance
    )
    features = speech_features(model, sound, clip_frames, fps=fps)
    yield Check("audio_emb", features[None], want["audio_emb"], tolerance)
