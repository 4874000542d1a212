"""Recordings of every kind give the same sound; what is none is refused in one line."""

import os
from pathlib import Path

import av
import hypothesis
import hypothesis.strategies as st
import librosa
import numpy as np
import pytest
import soundfile

from lavatar_jax.errors import UserError
from lavatar_jax.inference.sound import SAMPLE_RATE, TRACK_RATE, load_sound


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """[n, channels]: a chirp that fades in and out, so that codecs have no edges to smear."""
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * (200 + 100 * time) * time) * np.sin(np.pi * time / seconds) ** 2
    return np.stack([wave / (1 + c) for c in range(channels)], axis=1).astype(np.float32)


def save(path: Path, samples: np.ndarray, rate: int) -> Path:
    if path.suffix != ".m4a":
        soundfile.write(path, samples, rate)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="stereo" if samples.shape[1] == 2 else "mono")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), "fltp", layout=stream.layout.name)
        frame.sample_rate, frame.pts = rate, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


# What a format cannot say about its length, in samples: FFmpeg ends Vorbis early by up to a short block,
# and AAC in MP4 ends with a full frame.
SLACK = {".ogg": (-128, 0), ".m4a": (0, 1024)}


@pytest.mark.parametrize(
    ("suffix", "rate"),
    [
        *[(".wav", rate) for rate in (8000, 16000, 44100, 96000)],
        *[(".flac", 48000), (".ogg", 44100), (".mp3", 44100), (".m4a", 44100)],
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_any_format_and_rate(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    """Against librosa, which the reference loads speech with: equal samples, so equal start and length."""
    samples = tone(1.2345, rate, channels)
    sound = load_sound(save(tmp_path / f"voice{suffix}", samples, rate))
    expected = librosa.resample(samples.mean(axis=1), orig_sr=rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")
    assert sound.samples.dtype == np.float32
    assert sound.channels == channels
    shortest, longest = (np.round(n * SAMPLE_RATE / rate) for n in SLACK.get(suffix, (0, 0)))
    assert shortest <= len(sound.samples) - len(expected) <= longest
    common = min(len(sound.samples), len(expected))
    tolerance = 1e-4 if suffix in (".wav", ".flac") else 0.03
    np.testing.assert_allclose(sound.samples[:common], expected[:common], atol=tolerance)


@hypothesis.given(count=st.integers(1, 5000), rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000]))
def test_length_is_exact(tmp_path_factory: pytest.TempPathFactory, count: int, rate: int) -> None:
    path = tmp_path_factory.mktemp("sound") / "x.wav"
    sound = load_sound(save(path, np.zeros((count, 1), np.float32), rate))
    assert len(sound.samples) == -(-count * SAMPLE_RATE // rate)
    assert sum(piece.shape[1] for piece in sound.track()) == -(-count * TRACK_RATE // rate)


def test_track_keeps_both_channels(tmp_path: Path) -> None:
    samples = tone(0.5, TRACK_RATE, 2)
    sound = load_sound(save(tmp_path / "stereo.flac", samples, TRACK_RATE))
    np.testing.assert_allclose(np.concatenate(list(sound.track()), axis=1), samples.T, atol=1e-4)


def test_six_channels_become_two(tmp_path: Path) -> None:
    sound = load_sound(save(tmp_path / "cinema.wav", tone(0.2, 48000, 6), 48000))
    assert sound.channels == 2
    assert next(sound.track()).shape[0] == 2


def test_silence_is_sound(tmp_path: Path) -> None:
    sound = load_sound(save(tmp_path / "silence.wav", np.zeros((8000, 1), np.float32), 16000))
    assert sound.seconds == 0.5
    assert not sound.samples.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e4])
def test_samples_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    samples = tone(1.0, 16000)
    samples[9000] = value
    soundfile.write(tmp_path / "nan.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(UserError, match="not numbers"):
        load_sound(tmp_path / "nan.wav")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.wav", None, "no such audio"),
        ("empty.wav", b"", "empty"),
        ("letter.wav", b"dear reader\n" * 99, "no audio file"),
        ("letter.txt", b"dear reader\n" * 99, "no audio file"),
        ("head.mp3", b"ID3\x04\x00\x00\x00\x00\x00\x00", "no audio file|damaged"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n", "no audio file"),
        ("list.wav", b"ffconcat version 1.0\nfile other.wav\n", "no audio file"),
    ],
)
def test_bad_files_are_one_clear_line(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        load_sound(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder"):
        load_sound(tmp_path)


def test_zero_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="length is zero"):
        load_sound(save(tmp_path / "none.wav", np.zeros((0, 1), np.float32), 16000))


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=16, height=16)
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(UserError, match="no audio track"):
        load_sound(tmp_path / "mute.mp4")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-1, 1, (50_000, 1)), 16000)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="damaged or cut off"):
        load_sound(path)


@hypothesis.given(
    data=st.binary(max_size=200), start=st.sampled_from([b"", b"ID3", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS"])
)
def test_garbage_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "x.wav"
    path.write_bytes(start + data)
    with pytest.raises(UserError):
        load_sound(path)
