"""The video file: what went in comes out, in step, whatever happens while it is written."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lavatar_jax.errors import UserError
from lavatar_jax.inference import video
from lavatar_jax.inference.sound import TRACK_RATE
from lavatar_jax.inference.video import VideoWriter, default_scale, read_frames, read_video
from tests.tools.videos import film


def frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Smooth colours that change with time and place: [T, H, W, 3]."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([40 + 3 * x, 60 + 4 * y, 100 + (5 * t) % 100], axis=-1).astype(np.uint8)


def pieces(sound: np.ndarray, size: int = 777) -> Iterator[np.ndarray]:
    for start in range(0, sound.shape[1], size):
        yield sound[:, start : start + size]


def write(path: Path, blocks: list[np.ndarray], failure: type[BaseException] | None = None) -> None:
    sound = np.zeros((1, 10 * TRACK_RATE), np.float32)
    with VideoWriter(path, audio=pieces(sound)) as writer:
        for block in blocks:
            writer.write(block)
        if failure:
            raise failure


def test_frames_come_back_in_their_colours(tmp_path: Path) -> None:
    made = frames(30)
    with VideoWriter(tmp_path / "v.mp4", scale=1) as writer:
        for start in (0, 9, 21):
            writer.write(made[start : start + 12] if start else made[:9])
    read = read_video(tmp_path / "v.mp4")
    assert read.fps == 25
    assert read.sound is None
    assert read.frames.shape == made.shape
    assert np.abs(read.frames.astype(int) - made).mean() < 2.5
    assert os.listdir(tmp_path) == ["v.mp4"]
    assert stat.S_IMODE((tmp_path / "v.mp4").stat().st_mode) & 0o444


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_in_step(tmp_path: Path, channels: int) -> None:
    """A click starts with the first white frame: both must come back at the same instant."""
    flash = 20
    made = frames(50)
    made[flash:] = 255
    sound = np.zeros((channels, 2 * TRACK_RATE), np.float32)
    start = flash * TRACK_RATE // 25
    sound[:, start:] = 0.5 * np.sin(np.arange(sound.shape[1] - start) * 2 * np.pi * 1000 / TRACK_RATE)
    with VideoWriter(tmp_path / "v.mp4", audio=pieces(sound), channels=channels) as writer:
        for block in range(0, 50, 12):
            writer.write(made[block : block + 12])
    read = read_video(tmp_path / "v.mp4")
    assert read.sound is not None
    assert read.sound.channels == channels
    assert int(np.argmax(read.frames.mean((1, 2, 3)) > 250)) == flash
    heard = int(np.argmax(np.abs(np.concatenate(list(read.sound.track()), axis=1)[0]) > 0.1))
    assert abs(heard - start) < TRACK_RATE / 1000 * 5


@hypothesis.given(count=st.integers(1, 40), seconds=st.floats(0, 2), block=st.integers(1, 13))
@hypothesis.settings(max_examples=10)
def test_tracks_end_within_one_frame(
    tmp_path_factory: pytest.TempPathFactory, count: int, seconds: float, block: int
) -> None:
    """Sound that is too short is followed by silence, sound that is too long is cut."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    made = frames(count, 16, 16)
    sound = np.full((1, int(seconds * TRACK_RATE)), 0.1, np.float32)
    with VideoWriter(path, audio=pieces(sound)) as writer:
        for start in range(0, count, block):
            writer.write(made[start : start + block])
    assert writer.frames == count
    with av.open(str(path)) as container:
        lengths = [float(stream.duration * stream.time_base) for stream in container.streams]
    assert lengths[0] == pytest.approx(count / 25)
    assert abs(lengths[1] - lengths[0]) < 1 / 25


@pytest.mark.parametrize(("height", "width", "scale"), [(31, 47, 1), (31, 47, 3), (32, 48, 4)])
def test_enlargement_and_odd_sizes(tmp_path: Path, height: int, width: int, scale: int) -> None:
    with VideoWriter(tmp_path / "v.mp4", scale=scale) as writer:
        writer.write(frames(3, height, width))
    even_height, even_width = height + height % 2, width + width % 2
    assert read_video(tmp_path / "v.mp4").frames.shape == (3, scale * even_height, scale * even_width, 3)


def test_a_huge_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too large"):
        VideoWriter(tmp_path / "v.mp4", scale=16).write(frames(1, 16, 600))


def test_default_scale_makes_small_frames_visible() -> None:
    assert [default_scale(height) for height in (64, 96, 128, 256, 384, 720)] == [8, 6, 4, 2, 1, 1]


def test_ctrl_c_leaves_a_playable_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "v.mp4", [frames(12)], failure=KeyboardInterrupt)
    read = read_video(tmp_path / "v.mp4")
    assert len(read.frames) == 12
    assert read.sound is not None
    assert os.listdir(tmp_path) == ["v.mp4"]


def test_ctrl_c_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "v.mp4", [], failure=KeyboardInterrupt)
    assert not os.listdir(tmp_path)


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write(tmp_path / "v.mp4", [frames(12)], failure=RuntimeError)
    assert os.listdir(tmp_path) == ["v.mp4"]
    assert (tmp_path / "v.mp4").read_bytes() == b"old"


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own, so that it can be filled; needs the right to mount."""
    if os.system(f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder} 2>/dev/null"):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield
    finally:
        os.system(f"umount {folder}")


@pytest.mark.parametrize("kilobytes", [40, 400])
def test_a_full_disk_is_one_clear_line(tmp_path: Path, kilobytes: int) -> None:
    """Once full at the end, where the index is written, and once in the middle."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    with small_disk(tmp_path, kilobytes):
        with pytest.raises(UserError, match="disk is full"):
            write(tmp_path / "v.mp4", [noise] * (2 if kilobytes < 100 else 100))
        assert not os.listdir(tmp_path)


def test_a_full_disk_without_the_right_to_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video.os, "replace", no_space)
    with pytest.raises(UserError, match="disk is full"):
        write(tmp_path / "v.mp4", [frames(3)])
    assert not os.listdir(tmp_path)


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="cannot be written"),
        VideoWriter(tmp_path / "no" / "v.mp4") as writer,
    ):
        writer.write(frames(3))


@pytest.mark.parametrize("content", [None, b"", b"hello" * 100])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"v\.mp4"):
        read_video(tmp_path / "v.mp4")


@pytest.mark.parametrize(("rate", "step"), [(25, 1), (50, 2), (100, 4)])
def test_frames_are_taken_by_their_time(tmp_path: Path, rate: int, step: int) -> None:
    shown = film(tmp_path / "a.mp4", frames(40), None, fps=rate)
    every = np.stack(list(read_frames(shown)))
    np.testing.assert_array_equal(np.stack(list(read_frames(shown, 25))), every[::step])


def test_slow_videos_show_their_frames_for_longer(tmp_path: Path) -> None:
    shown = film(tmp_path / "a.mp4", frames(5), None, fps=10)
    every = np.stack(list(read_frames(shown)))
    nearest = [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]  # of 0, 40, 80 ... ms among 0, 100, 200 ... 400
    np.testing.assert_array_equal(np.stack(list(read_frames(shown, 25))), every[nearest])
