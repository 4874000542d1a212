import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lavatar_jax.inference import speech_stream
from lavatar_jax.inference.speech_features import hidden_states
from lavatar_jax.inference.speech_stream import RunningNorm, Wav2Vec2Stream, Wav2Vec2StreamConfig
from lavatar_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config

MODEL = Wav2Vec2(
    Wav2Vec2Config(
        layers=2, width=16, heads=2, ffn_width=24, conv_width=(8,) * 7, position_kernel=8, position_groups=4
    ),
    rngs=nnx.Rngs(0),
)
SMALL = Wav2Vec2StreamConfig(block_frames=3, context_frames=10)
FRAME = 640


def noise(count, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def streamed(samples, config, pieces=()):
    stream = Wav2Vec2Stream(MODEL, config)
    parts = [stream.push(piece) for piece in np.split(samples, np.cumsum(pieces, dtype=int))]
    return np.concatenate([*parts, stream.flush()], axis=-1)


def offline_at_fixed_ratio(samples):
    """The whole recording's hidden states at 5/3 round(6 k / 5), [L, D, T]."""
    states = hidden_states(MODEL, samples)
    frames = np.arange(-(-len(samples) // FRAME))
    position = np.minimum(5 / 3 * np.round(6 * frames / 5), states.shape[1] - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, states.shape[1] - 1)
    weight = (position - low)[:, None]
    return np.moveaxis(states[:, low] * (1 - weight) + states[:, high] * weight, 1, 2)


# What comes out


@settings(max_examples=8, deadline=None)
@given(pieces=st.lists(st.integers(0, 5000), max_size=6))
def test_pieces_change_nothing(pieces):
    samples = noise(13_333)
    assert np.array_equal(streamed(samples, SMALL, pieces), streamed(samples, SMALL))


def test_a_restored_stream_goes_on_exactly():
    samples, cut = noise(13_333), 7_000
    stream, other = Wav2Vec2Stream(MODEL, SMALL), Wav2Vec2Stream(MODEL, SMALL)
    before = stream.push(samples[:cut])
    other.push(noise(5_000, seed=1))
    other.set_state(stream.state())
    features = np.concatenate([before, other.push(samples[cut:]), other.flush()], axis=-1)
    assert np.array_equal(features, streamed(samples, SMALL))


@pytest.mark.parametrize("count", [0, 1, 399, 400, 640, 641, 640 * 3, 640 * 9 + 1, 640 * 30 - 1])
def test_a_recording_has_as_many_frames_as_with_log_mel(count):
    features = streamed(noise(count), SMALL)
    assert features.shape == (3, 16, -(-count // FRAME))
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert features.any() == (count >= 400)  # less is too short for the network


def test_a_window_that_holds_everything_gives_the_offline_states():
    samples = noise(FRAME * 25 + 123) * np.linspace(0.5, 1.5, FRAME * 25 + 123, dtype=np.float32) + 0.01
    want = offline_at_fixed_ratio(samples)
    whole = streamed(samples, Wav2Vec2StreamConfig(block_frames=26, context_frames=2))
    np.testing.assert_allclose(whole, want, rtol=1e-3, atol=1e-4)
    # In blocks of 3 too, if the past is in the context and the future in the look-ahead.
    blocks = streamed(samples, Wav2Vec2StreamConfig(block_frames=3, context_frames=26, lookahead_ms=26 * 40))
    np.testing.assert_allclose(blocks, want, rtol=1e-3, atol=1e-4)


def test_more_lookahead_is_nearer_to_the_whole_recording():
    samples = noise(FRAME * 60)
    want = offline_at_fixed_ratio(samples)

    def distance(lookahead_ms):
        config = Wav2Vec2StreamConfig(block_frames=3, context_frames=60, lookahead_ms=lookahead_ms)
        return np.linalg.norm(streamed(samples, config) - want) / np.linalg.norm(want)

    distances = [distance(ms) for ms in (0, 320, 1600)]
    assert distances[0] > 1.2 * distances[2]
    assert 0.5 > distances[0] >= distances[1] >= distances[2] > 0


@pytest.mark.parametrize("block_frames", [1, 7, 12])
def test_frames_lie_on_the_reference_cycle_for_ever(block_frames, monkeypatch):
    """Far into a stream, position 5/3 round(6 k / 5) of absolute frame k, always in the same shapes."""
    config = Wav2Vec2StreamConfig(block_frames=block_frames, context_frames=10)
    shapes, positions = set(), []

    def record(model, samples, first, end, low, weight):
        shapes.add((samples.shape, low.shape, weight.shape, first.shape, end.shape))
        positions.append(low + weight)
        return np.zeros((3, 16, block_frames), np.float32)

    monkeypatch.setattr(speech_stream, "_features", record)
    stream = Wav2Vec2Stream(MODEL, config)
    stream._done = 10**12 * block_frames
    for _ in range(10):
        stream.push(noise(FRAME * 12))
    assert len(shapes) == 1
    frames = np.arange(len(positions) * block_frames) + 10**12 * block_frames
    starts = 2 * (frames // block_frames * block_frames - 10)
    cycle = np.array([0, 1, 2, 4, 5])[frames % 5] + frames // 5 * 6  # frames of 30 a second
    assert len(frames) > 50
    np.testing.assert_allclose(np.concatenate(positions), (5 * cycle - 3 * starts) / 3, atol=1e-5)


# When it comes out


@pytest.mark.parametrize("lookahead_ms", [0, 80, 320])
def test_a_block_is_complete_when_its_lookahead_has_arrived(lookahead_ms):
    stream = Wav2Vec2Stream(
        MODEL, Wav2Vec2StreamConfig(block_frames=3, context_frames=10, lookahead_ms=lookahead_ms)
    )
    assert stream.push(noise(3 * FRAME + 16 * lookahead_ms - 1)).shape[-1] == 0
    assert stream.push(noise(1)).shape[-1] == 3
    assert stream.push(noise(3 * FRAME - 1)).shape[-1] == 0
    assert stream.push(noise(1)).shape[-1] == 3


def test_without_lookahead_nothing_after_a_frame_is_needed():
    """The network's last frame would look 5 ms ahead; the one before it stands for it."""
    config = Wav2Vec2StreamConfig(block_frames=1, context_frames=10, lookahead_ms=0)
    features = streamed(noise(FRAME * 8), config)
    assert np.abs(features).sum(axis=(0, 1)).min() > 1


def test_it_compiles_once_and_keeps_a_window():
    before = speech_stream._features._cache_size()
    config = Wav2Vec2StreamConfig(block_frames=4, context_frames=11, rest_seconds=np.inf)
    stream = Wav2Vec2Stream(MODEL, config)
    for seed in range(40):
        stream.push(noise(3000, seed))
        assert len(stream._samples) < config.window
        assert len(stream._quiet) <= 2 * config.block_frames + config.lookahead_ms // 20
    stream.flush()
    assert speech_stream._features._cache_size() == before + 1


# Loudness and silence


def test_statistics_are_those_of_the_sound_and_stop_in_silence():
    config = Wav2Vec2StreamConfig()
    sound = 3 * noise(16_000) + 0.02
    norm = RunningNorm(config)
    norm.hear(sound)
    np.testing.assert_allclose(norm(sound), (sound - sound.mean()) / sound.std(), atol=1e-4)
    norm.hear(np.zeros(16_000 // 2, np.float32))  # a pause counts
    paused = norm(sound)
    assert paused.std() == pytest.approx(np.sqrt(1.5), rel=0.01)
    quiet = norm.hear(1e-3 * noise(16_000 * 60))  # a long silence does not, even with some hiss
    assert np.array_equal(norm(sound), paused)
    assert quiet[-1] == 16_000 * 60.5


def test_silence_and_hiss_are_not_amplified():
    norm = RunningNorm(Wav2Vec2StreamConfig(floor_db=-40.0))
    hiss = 1e-3 * noise(16_000)
    norm.hear(hiss)
    assert np.abs(norm(hiss)).max() < 0.1


def test_a_new_level_is_followed_within_the_memory():
    norm = RunningNorm(Wav2Vec2StreamConfig(memory_seconds=2.0))
    norm.hear(noise(16_000 * 20))
    loud = 4 * noise(16_000 * 10)
    norm.hear(loud)
    assert norm(loud).std() == pytest.approx(1.0, abs=0.05)


def test_features_are_zeros_after_long_silence_and_come_back(monkeypatch):
    calls = []
    compute = speech_stream._features
    monkeypatch.setattr(speech_stream, "_features", lambda *args: calls.append(0) or compute(*args))
    config = Wav2Vec2StreamConfig(block_frames=5, context_frames=10, rest_seconds=0.4)
    sound = noise(FRAME * 20)
    silence = np.zeros(FRAME * 40, np.float32)
    features = streamed(np.concatenate([sound, silence, sound]), config)
    active = features.any(axis=(0, 1))
    # 0.4 s are ten frames: the tenth silent frame is the first of which that is so at its end.
    assert np.array_equal(np.flatnonzero(~active), np.arange(29, 60))
    assert len(calls) == 4 + 2 + 4  # blocks with something in them
    assert np.isfinite(features).all()
    never = Wav2Vec2StreamConfig(block_frames=5, context_frames=10, rest_seconds=np.inf)
    assert streamed(np.concatenate([sound, silence]), never).any(axis=(0, 1)).all()


def test_broken_samples_count_as_silence():
    broken = noise(FRAME * 10)
    silent = broken.copy()
    broken[::7], broken[3::7] = np.nan, np.inf
    silent[::7], silent[3::7] = 0, 0
    assert np.array_equal(streamed(broken, SMALL), streamed(silent, SMALL))


# Wrong settings


@pytest.mark.parametrize(
    "change", [{"lookahead_ms": 30}, {"lookahead_ms": -20}, {"block_frames": 0}, {"context_frames": 1}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=r"stream needs|multiple of 20 ms"):
        Wav2Vec2StreamConfig(**change)


def test_a_network_with_another_frame_rate_is_refused():
    config = Wav2Vec2Config(
        layers=1, width=8, heads=1, ffn_width=8, conv_width=(4,), conv_kernel=(10,), conv_stride=(5,),
        position_kernel=4, position_groups=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="each 320 samples"):
        Wav2Vec2Stream(Wav2Vec2(config, rngs=nnx.Rngs(0)))
