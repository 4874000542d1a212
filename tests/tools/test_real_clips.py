"""What happens to one video in a worker, and whose fault it is when that fails."""

import errno
import itertools
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from lavatar_jax.cli import run
from lavatar_jax.data.clip_filters import FilterConfig
from lavatar_jax.data.shards import read_manifest
from lavatar_jax.errors import UserError
from tests.tools.videos import film, speech, still
from tools import prepare_data, real_clips
from tools.real_clips import Job, cut_video
from tools.real_sources import Source

FILTERS = FilterConfig(seconds=(2, 30))
OPTIONS = ("--blocks", "1", "--motion-frames", "5", "--filters.seconds", "2", "30")


def job(video: Path, work: Path, faces: str = "any") -> Job:
    return Job(Source(video.name, video), work, ((64, 64),), faces, FILTERS)


def prepare(folder: Path, out: Path, *args: str) -> int:
    command = [str(folder), "--out", str(out), *OPTIONS, *args]
    return run(lambda: prepare_data.main(command))


def told(out: Path) -> dict[str, list[str]]:
    """Why videos that are done with were dropped."""
    lines = map(json.loads, (out / "videos.jsonl").read_text().splitlines())
    return {line["name"]: [reason for _, reason in line["dropped"]] for line in lines}


@pytest.mark.parametrize("name", ["0.npy", "0.sound.npy"])
def test_a_full_disk_is_not_the_fault_of_a_video(tmp_path: Path, name: str):
    folder = tmp_path / "work" / f"{zlib.crc32(b'a.mp4'):08x}"
    folder.mkdir(parents=True)
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.mp4 could not be prepared \(.*No space left on device"):
        cut_video(job(still(tmp_path / "a.mp4"), tmp_path / "work"))


def test_a_full_disk_ends_the_run_and_the_next_one_takes_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    video = still(tmp_path / "in" / "a.mp4")
    shutil.copy(video, tmp_path / "in" / "b.mp4")
    write, out = real_clips._write_pieces, tmp_path / "out"

    def full(path: Path, *args: object) -> None:
        if path.name == "b.mp4":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *args)

    monkeypatch.setattr(real_clips, "_write_pieces", full)
    assert prepare(tmp_path / "in", out, "--faces", "any", "--workers", "0") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "b.mp4 could not be prepared ([Errno 28] No space left on device)" in line
    assert told(out) == {"a.mp4": []}
    assert not (out / ".work").exists()
    monkeypatch.setattr(real_clips, "_write_pieces", write)
    assert prepare(tmp_path / "in", out, "--faces", "any", "--workers", "0") == 0
    assert told(out) == {"a.mp4": [], "b.mp4": []}


def test_a_detector_that_fails_is_not_the_fault_of_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "flaky_detector.py").write_text(
        "from pathlib import Path\n"
        "from lavatar_jax.data.face_boxes import whole_picture\n"
        "def detect(picture):\n"
        "    if Path(__file__).with_name('mended').exists():\n"
        "        return whole_picture(picture)\n"
        "    raise ValueError('no such layer')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "in").mkdir()
    still(tmp_path / "in" / "a.mp4")
    command = (tmp_path / "in", tmp_path / "out", "--faces", "flaky_detector:detect", "--workers", "1")
    assert prepare(*command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.mp4: the face detector flaky_detector:detect failed" in line
    assert "ValueError: no such layer; flaky_detector.py, line 6" in line
    assert told(tmp_path / "out") == {}
    (tmp_path / "mended").touch()
    assert prepare(*command) == 0
    assert told(tmp_path / "out") == {"a.mp4": []}


def test_a_file_that_is_gone_is_not_a_damaged_one(tmp_path: Path):
    with pytest.raises(UserError, match="No such file"):
        cut_video(job(tmp_path / "a.mp4", tmp_path / "work"))


def test_what_a_broken_file_does_to_a_decoder_condemns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_codec(*args: object) -> None:
        raise AttributeError("no codec")

    monkeypatch.setattr(real_clips, "open_media", no_codec)
    outcome = cut_video(job(still(tmp_path / "a.mp4"), tmp_path / "work"))
    assert outcome.dropped == [("whole video (AttributeError: no codec)", real_clips.UNREADABLE)]


def test_a_video_that_ends_earlier_the_second_time_gives_no_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    decode, calls = real_clips._decode, []

    def shorter(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
        calls.append(path)
        yield from itertools.islice(decode(path), 60 if len(calls) > 1 else None)

    monkeypatch.setattr(real_clips, "_decode", shorter)
    outcome = cut_video(job(still(tmp_path / "a.mp4"), tmp_path / "work"))
    assert [reason for _, reason in outcome.dropped] == [real_clips.UNREADABLE]
    assert len(calls) == 2
    assert not outcome.pieces
    assert not any((tmp_path / "work").iterdir())


def test_the_manifest_tells_the_faces_that_were_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "counting_detector.py").write_text(
        "from lavatar_jax.data.face_boxes import whole_picture\n"
        "looks = 0\n"
        "def detect(picture):\n"
        "    global looks\n"
        "    looks += 1\n"
        "    return whole_picture(picture) * (2 if looks == 3 else 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "in").mkdir()
    still(tmp_path / "in" / "a.mp4")
    options = ("--workers", "0", "--filters.crowd-share", "0.2")
    assert prepare(tmp_path / "in", tmp_path / "out", "--faces", "counting_detector:detect", *options) == 0
    assert {row["n_faces"] for row in read_manifest(tmp_path / "out")} == {2}
    assert prepare(tmp_path / "in", tmp_path / "any", "--faces", "any", *options) == 0
    assert not any("n_faces" in row for row in read_manifest(tmp_path / "any"))


def turn(video: Path, quarters: int) -> None:
    """Let players turn an MP4's picture clockwise, as phones do: by the matrix in its track header."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters]
    matrix = struct.pack(">9i", *(one << 16 for one in (cos, sin, 0, -sin, cos, 0, 0, 0)), 1 << 30)
    data = bytearray(video.read_bytes())
    header = data.index(b"tkhd")  # the picture's track is the first
    place = header + 44  # name 4, flags 4, times and number 20, layer, group and volume 16
    assert data[place : place + 4] == struct.pack(">i", 1 << 16)  # not turned so far
    data[place : place + 36] = matrix
    video.write_bytes(data)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_phone_videos_are_turned_as_players_do(tmp_path: Path, quarters: int):
    """Red, green, blue and white in the corners of an upright picture, filmed as the phone was held."""
    corners = np.array([[[200, 20, 20], [20, 200, 20]], [[20, 20, 200], [230, 230, 230]]], np.uint8)
    upright = corners.repeat(96, axis=0).repeat(64, axis=1)
    filmed = np.rot90(upright, quarters)  # players turn it back, clockwise
    video = film(tmp_path / "phone.mp4", filmed[None].repeat(70, axis=0), speech(2.8))
    turn(video, quarters)
    outcome = cut_video(job(video, tmp_path / "work"))
    assert (outcome.dropped, outcome.width, outcome.height) == ([], 128, 192)
    (piece,) = outcome.pieces
    frames = np.load(piece.frames).astype(int)
    assert frames.shape == (70, 64, 64, 3)
    # The cut is square, from the middle of the picture: all four colours are in it.
    seen = frames[:, [[8, 8], [56, 56]], [[8, 56], [8, 56]]]
    assert np.abs(seen - corners).max() < 30
