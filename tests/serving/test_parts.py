"""Parts of the live server that need no server: level, clock, encoder, recording, text to speech, logs."""

import asyncio
import errno
import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

import av
from hypothesis import given
from hypothesis import strategies as st

from lavatar_jax.errors import UserError
from lavatar_jax.models.speech_level import SPEECH_LEVEL_DB, speech_level_db
from lavatar_jax.serving.encoder import Encoder, Moment, video_size
from lavatar_jax.serving.errors import ApiError
from lavatar_jax.serving.level import RunningLevel
from lavatar_jax.serving.logs import JsonLines
from lavatar_jax.serving.playout import Playout, Sent
from lavatar_jax.serving.recording import Recording
from lavatar_jax.serving.speech import check_voice
from lavatar_jax.serving.tts import Festival, Flite, HttpSpeech, find_tts
from lavatar_jax.serving.uploads import Resampler
from lavatar_jax.serving.watermark import Watermark
from tests.programs import need_program

RATE = 16_000
RNG = np.random.default_rng(0)


def noise(seconds: float, db: float) -> np.ndarray:
    return (10 ** (db / 20) * RNG.standard_normal(int(seconds * RATE))).astype(np.float32)


def in_pieces(level: RunningLevel, samples: np.ndarray, size: int = 333) -> np.ndarray:
    return np.concatenate([level(samples[at : at + size]) for at in range(0, len(samples), size)])


def babble(seconds: float, db: float) -> np.ndarray:
    """Syllables of 200 ms with gaps of 60 ms."""
    samples = noise(seconds, db)
    return samples * (np.arange(len(samples)) % (260 * 16) < 200 * 16)


@pytest.mark.parametrize("db", [-45.0, -35.0, -22.0, -8.0])
def test_speech_of_any_loudness_comes_to_one_level(db: float) -> None:
    said = in_pieces(RunningLevel(), np.concatenate([noise(0.5, -70), babble(4.0, db)]))
    assert speech_level_db(said[-2 * RATE :]) == pytest.approx(SPEECH_LEVEL_DB, abs=3.0)
    first = said[int(0.5 * RATE) : int(1.1 * RATE)]
    assert speech_level_db(first) == pytest.approx(SPEECH_LEVEL_DB, abs=6.0)  # soon, too


def test_gain_stands_still_in_silence_and_silence_stays_silence() -> None:
    level = RunningLevel()
    in_pieces(level, babble(2.0, -40.0))
    before = level.gain_db
    room = in_pieces(level, noise(20.0, -65.0))
    assert level.gain_db == pytest.approx(before)
    assert not level.open
    assert speech_level_db(room[RATE:]) < -60.0  # not raised by the gain of 18 dB
    assert np.all(in_pieces(level, np.zeros(RATE, np.float32))[320:] == 0.0)
    noisy = in_pieces(RunningLevel(), noise(3.0, -50.0))
    assert speech_level_db(noisy[RATE:]) < -70.0  # it is taken for what it is within a second


def test_a_held_vowel_is_speech_and_a_fan_is_not() -> None:
    tone = (0.1 * np.sin(np.arange(int(2.5 * RATE)) / 8)).astype(np.float32)
    assert np.abs(in_pieces(RunningLevel(), tone)[-RATE:]).max() > 0.05
    fan = in_pieces(RunningLevel(), noise(8.0, -35.0))
    assert speech_level_db(fan[-2 * RATE :]) < -55.0


@given(st.lists(st.integers(0, 2000), max_size=20))
def test_no_sample_is_lost(sizes: list[int]) -> None:
    level, samples = RunningLevel(), np.ones(sum(sizes), np.float32)
    out = [level(piece) for piece in np.split(samples, np.cumsum(sizes)[:-1])] if sizes else []
    assert sum(map(len, out)) == sum(sizes) // 320 * 320


def test_resampled_as_it_comes() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32)
    resampler = Resampler(48_000)
    out = np.concatenate([resampler(tone[at : at + 960]) for at in range(0, 48_000, 960)])
    assert len(out) == pytest.approx(16_000, abs=64)
    assert np.abs(out[2000:14_000]).max() == pytest.approx(1.0, abs=0.02)
    for rate in (0, -5, 10**9):
        with pytest.raises(ApiError):
            Resampler(rate)


# ---- clock --------------------------------------------------------------------------------------------


class Watching:
    def __init__(self) -> None:
        self.sent: list[Sent] = []

    def show(self, sent: Sent) -> None:
        self.sent.append(sent)


def moment(number: int, loud: bool = True) -> Moment:
    return Moment(
        time=number / 25, video=bytes([number % 256]), keyframe=number == 0, opus=(b"a", b"b"), pcm=b"",
        loud=loud, made=0.0,
    )  # fmt: skip


def playout(underruns: list[int], delay: float = 0.08) -> tuple[Playout, Watching]:
    viewer = Watching()
    player = Playout(25, delay, on_underrun=lambda: underruns.append(1))
    player.viewers.append(viewer)
    return player, viewer


async def body_of_the_clock() -> None:
    underruns: list[int] = []
    player, viewer = playout(underruns)
    player.add([moment(0), moment(1)])
    for _ in range(4):
        player.tick()
    player.add([moment(2)])
    player.tick()
    shown = [(sent.time, None if sent.moment is None else sent.moment.video[0]) for sent in viewer.sent]
    # Time goes on every 40 ms, picture and sound of a moment have one time, and nothing is left out.
    assert shown == [(0.0, 0), (0.04, 1), (0.08, None), (0.12, None), (0.16, 2)]
    assert player.underruns == len(underruns) == 2


def test_underruns_hold_the_picture_and_insert_silence() -> None:
    asyncio.run(body_of_the_clock())


def test_a_delay_that_is_not_needed_is_given_up_in_a_pause() -> None:
    async def run() -> None:
        player, viewer = playout([])
        player.add([moment(n) for n in range(10)])
        for n in range(10, 300):
            player.add([moment(n, loud=n < 200)])
            player.tick()
        numbers = [sent.moment.video[0] for sent in viewer.sent if sent.moment]
        assert numbers == [n % 256 for n in range(len(numbers))]  # decoders get every picture
        left_out = [sent for sent in viewer.sent if not sent.sound]
        assert len(left_out) == 1  # slowly, and not while somebody speaks
        assert left_out[0].moment.time >= 8.0
        times = [sent.time for sent in viewer.sent]
        assert times == sorted(set(times))

    asyncio.run(run())


def test_moments_go_out_in_real_time() -> None:
    async def run() -> list[float]:
        player, _ = playout([])
        at: list[float] = []
        player._on_sent = lambda sent: at.append(asyncio.get_running_loop().time())
        player.add([moment(n) for n in range(10)])
        task = asyncio.create_task(player.run())
        while len(at) < 10:
            await asyncio.sleep(0.01)
        task.cancel()
        return at

    at = asyncio.run(run())
    assert 9 * 0.04 - 0.05 < at[-1] - at[0] < 2.0  # later only where the machine is busy


# ---- encoding -----------------------------------------------------------------------------------------


def faces(count: int) -> np.ndarray:
    base = np.linspace(40, 200, 32 * 32 * 3).reshape(32, 32, 3)
    return np.stack([np.roll(base, n // 2, axis=1) for n in range(count)]).astype(np.uint8)


def decode(moments: list[Moment]) -> list[np.ndarray]:
    decoder = av.CodecContext.create("h264", "r")
    packets = [*(av.Packet(m.video) for m in moments), None]
    return [frame.to_ndarray(format="rgb24") for p in packets for frame in decoder.decode(p)]


def test_sizes() -> None:
    assert video_size(128, 128, 512) == (512, 512)
    assert video_size(704, 384, 512) == (704, 384)
    assert video_size(17, 15, 16) == (18, 16)


def test_every_frame_can_be_shown_and_newcomers_see_one_within_a_second() -> None:
    encoder = Encoder((256, 256), 25, 1_000_000)
    tone = (0.3 * np.sin(np.arange(640 * 60) / 10)).astype(np.float32)
    moments = encoder.encode(0.0, faces(60), tone)
    assert [m.time for m in moments] == pytest.approx([n / 25 for n in range(60)])
    keyframes = [n for n, m in enumerate(moments) if m.keyframe]
    assert keyframes[0] == 0
    assert np.diff([*keyframes, 60]).max() <= 25
    assert all(m.video.startswith(b"\0\0\0\1\x67") for m in moments if m.keyframe)  # with its parameters
    frames = decode(moments)
    assert len(frames) == 60
    assert np.abs(frames[0][::8, ::8].astype(int) - faces(1)[0]).mean() < 12
    assert {len(m.opus) for m in moments} == {2}
    assert {len(m.pcm) for m in moments} == {1280}
    assert all(m.loud for m in moments)
    encoder.video.force_keyframe()
    forced = encoder.encode(2.4, faces(2), tone[:1280] * 0)
    assert [m.keyframe for m in forced] == [True, False]
    assert not forced[0].loud


def test_sent_frames_carry_the_mark() -> None:
    plain, marked = (Encoder((256, 256), 25, 600_000, mark) for mark in (None, Watermark()))
    sound = np.zeros(640 * 25, np.float32)
    assert not Watermark().detect(decode(plain.encode(0.0, faces(25), sound))).present
    assert Watermark().detect(decode(marked.encode(0.0, faces(25), sound))).present


def test_sound_that_opus_packets_do_not_divide() -> None:
    with pytest.raises(UserError, match="20 ms"):
        Encoder((64, 64), 30, 600_000)


# ---- recording ----------------------------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "r.mp4", size=(256, 256), fps=25, seconds=100, nbytes=1 << 30)


def tone_moments(encoder: Encoder, count: int) -> list[Moment]:
    return encoder.encode(0.0, faces(count), (0.3 * np.sin(np.arange(640 * count) / 10)).astype(np.float32))


def lengths(path: Path) -> tuple[int, float]:
    """Frames of video, seconds of sound."""
    with av.open(str(path)) as file:
        frames = sum(1 for _ in file.decode(video=0))
    with av.open(str(path)) as file:
        samples = sum(frame.samples for frame in file.decode(audio=0))
        return frames, samples / file.streams.audio[0].rate


def test_a_recording_can_be_played_at_any_moment(recording: Recording, tmp_path: Path) -> None:
    encoder = Encoder((256, 256), 25, 600_000)
    encoder.encode(0.0, faces(3), np.zeros(640 * 3, np.float32))
    for _ in range(6):  # it begins with the next keyframe
        recording.write(tone_moments(encoder, 24))
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(recording.path.read_bytes())
    assert lengths(copy)[0] >= recording.frames - 72
    recording.close()
    recording.close()
    frames, seconds = lengths(recording.path)
    assert frames == recording.frames == 6 * 24 - 21
    assert seconds == pytest.approx(frames / 25, abs=0.1)
    assert recording.about()["state"] == "off"


class FullDisk(io.FileIO):
    def write(self, data: bytes) -> int:
        if self.tell() > 150_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data[:1000])  # a disk may take less than it was given


def test_a_full_disk(recording: Recording) -> None:
    recording._file.close()
    recording._file = FullDisk(recording.path, "w")
    encoder = Encoder((256, 256), 25, 600_000, Watermark())
    moments = [moment for _ in range(20) for moment in tone_moments(encoder, 25)]
    with pytest.raises(UserError, match="the recording: the disk is full") as told:
        recording.write(moments)
    assert str(recording.path.parent) not in str(told.value)
    assert recording.state == "failed"
    recording.write(tone_moments(encoder, 1))  # nothing more happens
    assert lengths(recording.path)[0] >= 24  # what there is can be played


def test_the_longest_recording(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "r.mp4", size=(256, 256), fps=25, seconds=1, nbytes=1 << 30)
    with pytest.raises(UserError, match="as long as it may be"):
        recording.write(tone_moments(Encoder((256, 256), 25, 600_000), 30))
    assert lengths(recording.path)[0] == 30
    with pytest.raises(UserError, match="the recording: cannot be written"):
        Recording(tmp_path / "nowhere" / "r.mp4", size=(256, 256), fps=25, seconds=1, nbytes=1)


# ---- text to speech -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "kind"), [("flite", Flite), ("text2wave", Festival)])
def test_installed_programs(program: str, kind: type) -> None:
    need_program(program, kind.name)
    tts = kind()
    samples = tts.speak("-o hello; touch x $(id) `id`\nthere", tts.voices[0])
    assert 0.5 < len(samples) / RATE < 12
    assert speech_level_db(samples) == pytest.approx(SPEECH_LEVEL_DB, abs=1.5)


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert find_tts("auto") is None
    assert find_tts("off") is None
    with pytest.raises(UserError, match="not installed"):
        find_tts("flite")
    with pytest.raises(UserError, match="--tts-url"):
        find_tts("http")
    with pytest.raises(UserError, match="http://"):
        find_tts("http", "file:///etc/passwd")
    monkeypatch.setattr(shutil, "which", lambda program: f"/bin/{program}")
    assert find_tts("auto").name == "flite"
    assert find_tts("auto", "http://127.0.0.1:1/").name == "http"
    assert check_voice(Flite(), "rms") == "rms"
    for voice in ("none", "--help", 5, None):
        with pytest.raises(ApiError, match="one of slt"):
            check_voice(Flite(), voice)


def test_a_service_that_is_not_there() -> None:
    with pytest.raises(ApiError, match="could not be spoken"):
        HttpSpeech("http://127.0.0.1:9/").speak("hello", "alloy")


def test_log_lines_are_json() -> None:
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "it\nis %s", "args": ("so",)})
    record.session = "s_1"
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["session"] == "s_1"
    assert json.loads(line)["message"] == "it\nis so"
