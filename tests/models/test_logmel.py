import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavatar_jax.models.logmel import LogMelConfig, LogMelStream, log_mel


def noise(count, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    past=st.integers(0, 2),
    lookahead=st.integers(0, 3),
)
def test_streaming_equals_offline_exactly(pieces, past, lookahead):
    config = LogMelConfig(past=past, lookahead=lookahead)
    samples = noise(sum(pieces))
    stream = LogMelStream(config)
    parts = [stream.push(piece) for piece in np.split(samples, np.cumsum(pieces)[:-1])]
    streamed = np.concatenate([*parts, stream.flush()], axis=-1)
    assert np.array_equal(streamed, log_mel(samples, config))
    assert streamed.shape == (1, config.dim, -(-len(samples) // 640))


@pytest.mark.parametrize("cut", [0, 100, 640, 5000])
def test_a_restored_stream_goes_on_exactly(cut):
    samples = noise(9000)
    stream, other = LogMelStream(), LogMelStream()
    before = stream.push(samples[:cut])
    other.push(noise(999, seed=1))
    other.set_state(stream.state())
    stream.push(noise(2000, seed=2))  # the state is a copy
    features = np.concatenate([before, other.push(samples[cut:]), other.flush()], axis=-1)
    assert np.array_equal(features, log_mel(samples))


def test_a_frame_is_complete_when_its_lookahead_has_arrived():
    stream = LogMelStream()
    assert stream.push(noise(3 * 640 - 1)).shape[-1] == 0
    assert stream.push(noise(1)).shape[-1] == 1
    assert stream.push(noise(640)).shape[-1] == 1


def test_silence_is_constant_and_small():
    features = log_mel(np.zeros(6400, np.float32))
    assert features.shape == (1, 192, 10)
    assert np.ptp(features) == 0.0
    assert abs(features[0, 0, 0]) < 2.0


def test_broken_samples_count_as_silence():
    broken = np.full(6400, np.nan, np.float32)
    broken[::2] = np.inf
    assert np.array_equal(log_mel(broken), log_mel(np.zeros(6400, np.float32)))


def test_tone_is_loudest_in_its_band_and_in_its_frame():
    config = LogMelConfig(past=0, lookahead=0, pooled=1)
    samples = np.zeros(640 * 9, np.float32)
    samples[640 * 4 : 640 * 5] = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(640) / 16_000)
    features = log_mel(samples, config)[0]
    band, frame = np.unravel_index(features.argmax(), features.shape)
    assert frame == 4
    assert band == 7  # centred at 967 Hz; its neighbour at 1133 Hz


def test_pooling_must_divide_the_hops():
    with pytest.raises(ValueError, match="cannot be averaged"):
        LogMelConfig(pooled=3)
