"""Folders prepared again: with other options, later captions, lost shards, mended videos."""

import functools
import json
import tarfile
from pathlib import Path

import pytest

from lavatar_jax.data.loader import ShardSource
from lavatar_jax.data.shards import read_dataset, read_manifest
from tests.tools.videos import OPTIONS, prepare, still, told
from tools import prepare_data, real_clips
from tools.real_clips import Job


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_records_of_a_folder_passed_the_same_filters(
    cheap_encoder: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    still(tmp_path / "in" / "a.mp4")
    command = (tmp_path / "in", "--out", tmp_path / "out", *OPTIONS)
    assert prepare(*command, "--faces", "any", "--filters.min-level-db", "0") == 2
    assert "none of 1 videos gave a clip" in capsys.readouterr().err
    assert prepare(*command, "--faces", "any") == 0  # nothing was kept: all is looked at again
    before = contents(tmp_path / "out")
    for other, difference in (
        (("--faces", "any", "--filters.min-scale", "0.4"), "--filters.min-scale 0.6, not 0.4; choose"),
        (("--faces", "lavatar_jax.data.face_boxes:whole_picture"), "--faces any, not lavatar_jax"),
        (("--faces", "any", "--motion-frames", "9"), "--motion-frames 5, not 9"),
    ):
        capsys.readouterr()
        assert prepare(*command, *other) == 2
        assert difference in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert read_dataset(tmp_path / "out").encoder == settings
    for name in ("faces", "filters"):  # as folders of earlier versions
        settings.pop(name)
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    assert prepare(*command, "--faces", "any") == 0


def test_captions_that_come_later_are_taken(cheap_encoder: None, tmp_path: Path):
    (tmp_path / "in").mkdir()
    video = still(tmp_path / "in" / "a.mp4")
    for name in ("b", "c"):
        (tmp_path / "in" / f"{name}.mp4").symlink_to(video)
    (tmp_path / "in" / "b.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "in" / "c.txt").write_text("smiling")
    command = (tmp_path / "in", "--out", tmp_path / "out", "--faces", "any", *OPTIONS)

    def captions() -> dict[str, str]:
        source = ShardSource(tmp_path / "out", text_len=16, text_dim=64)
        return {source.ids[i]: str(source.record(i)["caption"]) for i in range(len(source))}

    assert prepare(*command) == 0
    first = captions()
    assert set(first.values()) == {"a person talking", "smiling"}
    before = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    assert prepare(*command) == 0  # one is still not UTF-8
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.txt").write_text(f"nodding {name}")
    assert prepare(*command) == 0
    wanted = {"a": "nodding a", "b": "nodding b", "c": "smiling"}
    assert captions() == {name: wanted[name[0]] for name in first}
    assert sorted(told(tmp_path / "out")) == ["a.mp4", "b.mp4", "c.mp4"]
    before = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    assert prepare(*command) == 0
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before


def test_records_that_are_lost_are_made_again(cheap_encoder: None, tmp_path: Path):
    """With a shard that somebody removed, as it was damaged; the journal still has its videos."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    still(folder / "a.mp4")
    (folder / "b.mp4").symlink_to(folder / "a.mp4")
    command = (folder, "--out", out, "--faces", "any", "--shard-records", "1", *OPTIONS)
    assert prepare(*command) == 0
    rows = read_manifest(out)
    assert {row["video"] for row in rows} == {"a.mp4", "b.mp4"}
    lost = next(row["shard"] for row in rows if row["video"] == "b.mp4")
    (out / lost).unlink()
    assert prepare(*command) == 0
    again = read_manifest(out)
    assert sorted(row["id"] for row in again) == sorted(row["id"] for row in rows)
    assert all((out / row["shard"]).is_file() for row in again)
    assert sorted(told(out)) == ["a.mp4", "b.mp4"]
    assert len(ShardSource(out, text_len=16, text_dim=64)) == len(rows)


def test_what_gave_nothing_is_looked_at_again_when_it_may_give_more(
    cheap_encoder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A video that is still being copied, one whose process was killed, and one that is simply bad."""
    folder, looked_at = tmp_path / "in", []
    folder.mkdir()
    whole = still(tmp_path / "whole.mp4").read_bytes()
    for name, data in (("copied", whole[: len(whole) // 2]), ("killed", whole), ("bad", b"no video")):
        (folder / f"{name}.mp4").write_bytes(data)
    (folder / "copied.tar").write_bytes(b"nonsense" * 200)

    def cut(jobs: list[Job], workers: int, crashes: bool = False):
        looked_at[:] = [job.source.name for job in jobs]
        for job in jobs:
            if crashes and job.source.name == "killed.mp4":
                yield real_clips.Outcome(job.source.name, dropped=[("whole video", real_clips.CRASHED)])
            else:
                yield real_clips.cut_video(job)

    command = (folder, "--out", tmp_path / "out", "--faces", "any", *OPTIONS)
    monkeypatch.setattr(prepare_data, "cut_all", functools.partial(cut, crashes=True))
    assert prepare(*command) == 2  # nothing of use yet
    assert sorted(told(tmp_path / "out")) == ["bad.mp4", "copied.mp4", "copied.tar", "killed.mp4"]
    monkeypatch.setattr(prepare_data, "cut_all", cut)
    (folder / "copied.mp4").write_bytes(whole)
    with tarfile.open(folder / "copied.tar", "w") as tar:
        tar.add(tmp_path / "whole.mp4", "000.mp4")
    assert prepare(*command) == 0
    assert looked_at == ["copied.mp4", "copied.tar/000.mp4", "killed.mp4"]
    assert {row["video"] for row in read_manifest(tmp_path / "out")} == set(looked_at)
    assert sorted(told(tmp_path / "out")) == ["bad.mp4", "copied.mp4", "copied.tar/000.mp4", "killed.mp4"]
    assert prepare(*command) == 0
    assert looked_at == []
