"""Preparing many videos: what is read, compiled or written so often that it would take most of the time."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.cli import run
from lavatar_jax.data.clip_filters import FilterConfig
from tests.tools.videos import speech, still
from tools import prepare_data
from tools.real_clips import Outcome, Piece
from tools.real_encode import ClipEncoder
from tools.real_sources import fetch, find_sources, read_caption


def test_pieces_wait_where_they_are_told_to(
    cheap_encoder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "in").mkdir()
    still(tmp_path / "in" / "a.mp4")
    cut, places = prepare_data.cut_video, []
    monkeypatch.setattr(prepare_data, "cut_video", lambda job: (places.append(job.work), cut(job))[1])
    command = (
        tmp_path / "in", "--out", tmp_path / "out", "--faces", "any", "--workers", "0", "--blocks", "1",
        "--motion-frames", "5", "--filters.seconds", "2", "30", "--filters.reference-gap", "0.5",
    )  # fmt: skip
    assert run(lambda: prepare_data.main([*map(str, command), "--work", str(tmp_path / "fast")])) == 0
    assert [place.parent for place in places] == [tmp_path / "fast"]
    assert list((tmp_path / "fast").iterdir()) == []


def test_a_speech_encoder_hears_few_different_lengths(cheap_encoder: None, tmp_path: Path):
    """It compiles anew for each."""
    encoder = ClipEncoder("tiny", blocks=1, motion_frames=5, filters=FilterConfig(reference_gap=0.2))
    encoder._speech, heard = object(), set()
    encoder.hear = lambda samples, frames: (heard.add(frames), np.zeros((1, 192, frames)))[1]
    for frames in range(41, 60):
        piece = Piece(
            start=0, frames=tmp_path / "0.npy", samples=tmp_path / "0.sound.npy", face=100.0, level_db=-20.0,
            place=(0.25, 0.25, 0.75, 0.75),
        )  # fmt: skip
        np.save(piece.frames, np.zeros((frames, 128, 128, 3), np.uint8))
        np.save(piece.samples, speech(frames / 25))
        kept = [record for _, record in encoder.records(Outcome("a.mp4"), piece, set())]
        assert [record["audio"].shape for record in kept] == [(1, 192, 12)] * len(kept)
    assert heard == {41, 53}


def test_a_tar_is_opened_once_for_all_of_its_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for name in ("0.mp4", "0.txt", "1.mp4", "1.txt", "2.mp4", "2.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    sources, _ = find_sources(tmp_path)
    opened, count = tarfile.open, []
    monkeypatch.setattr(tarfile, "open", lambda path: (count.append(path), opened(path))[1])
    (tmp_path / "out").mkdir()
    for number, source in enumerate(sources):
        assert fetch(source, tmp_path / "out").read_text() == f"{number}.mp4"
        assert read_caption(source) == (f"{number}.txt", None)
    assert len(count) == 1
    with opened(tmp_path / "web.tar", "a") as tar:  # another file now
        tar.addfile(tarfile.TarInfo("3.mp4"))
    os.utime(tmp_path / "web.tar", ns=(0, 0))  # clocks may be slow
    assert read_caption(sources[0])[0] == "0.txt"
    assert len(count) == 2
