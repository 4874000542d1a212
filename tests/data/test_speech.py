import wave

import numpy as np
import pytest

from lavatar_jax.data.sentences import HELDOUT_SENTENCES, TRAINING_SENTENCES
from lavatar_jax.data.speech import (
    HELDOUT_VOICES,
    TRAINING_VOICES,
    Voice,
    read_wav,
    recording,
    synthesize,
    write_wav,
)  # fmt: skip
from lavatar_jax.errors import UserError
from lavatar_jax.models.speech_level import normalise_level, speech_level_db
from tests.programs import need_program


@pytest.fixture
def espeak() -> None:
    need_program("espeak-ng", "espeak-ng")


needs_espeak = pytest.mark.usefixtures("espeak")
ESPEAK = Voice(program="espeak-ng", name="en-us+m1")


def test_held_out_voices_and_sentences_are_new():
    assert len(TRAINING_SENTENCES) + len(HELDOUT_SENTENCES) >= 300
    assert not set(TRAINING_SENTENCES) & set(HELDOUT_SENTENCES)
    speakers = {(voice.program, voice.name.split("+")[-1]) for voice in TRAINING_VOICES}
    assert not speakers & {(voice.program, voice.name.split("+")[-1]) for voice in HELDOUT_VOICES}


def test_missing_program_is_the_users_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get install espeak-ng"):
        synthesize("hello", ESPEAK)


@needs_espeak
def test_unknown_voice_is_the_users_error():
    with pytest.raises(UserError, match="could not speak"):
        synthesize("hello", Voice(program="espeak-ng", name="nobody"))


@needs_espeak
def test_speech_depends_on_seed_and_is_kept(tmp_path):
    first = synthesize("Good morning.", ESPEAK, 1, cache=tmp_path)
    assert first.dtype == np.float32
    assert 0.4 < len(first) / 16_000 < 4.0
    assert len(synthesize("Good morning.", ESPEAK, 2, cache=tmp_path)) != len(first)
    assert len(list(tmp_path.glob("*.wav"))) == 2
    np.testing.assert_allclose(synthesize("Good morning.", ESPEAK, 1, cache=tmp_path), first, atol=0)


@needs_espeak
def test_recordings_speak_and_pause(tmp_path):
    samples = recording(6, "train", 8.0, cache=tmp_path)
    assert samples.shape == (8 * 16_000,)
    assert np.array_equal(samples, recording(6, "train", 8.0, cache=tmp_path))
    power = np.square(samples).reshape(-1, 640).mean(1)
    assert 0.1 < (power < 1e-4).mean() < 0.7


def test_levels_and_files_round_trip(tmp_path):
    tone = (0.02 * np.sin(np.arange(16_000) * 0.3)).astype(np.float32)
    loud = normalise_level(tone)
    assert speech_level_db(loud) == pytest.approx(-22.0, abs=0.1)
    assert np.array_equal(normalise_level(np.zeros(16_000, np.float32)), np.zeros(16_000, np.float32))
    write_wav(tmp_path / "tone.wav", loud)
    np.testing.assert_allclose(read_wav(tmp_path / "tone.wav"), loud, atol=1e-4)


def test_only_16_bit_recordings_are_read(tmp_path):
    with wave.open(str(tmp_path / "deep.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(3)
        file.setframerate(16_000)
        file.writeframes(bytes(3 * 640))
    with pytest.raises(UserError, match=r"deep\.wav has samples of 24 bits"):
        read_wav(tmp_path / "deep.wav")
    (tmp_path / "words.wav").write_text("not a sound")
    with pytest.raises(UserError, match=r"words\.wav: .*16-bit PCM"):
        read_wav(tmp_path / "words.wav")
