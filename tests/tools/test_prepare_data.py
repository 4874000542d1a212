"""Videos made here, good and broken ones, through the whole preparation; mostly with a toy VAE."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.data.clip_filters import FilterConfig
from lavatar_jax.data.loader import ShardSource, record_batches
from lavatar_jax.data.shards import RENDERED, read_manifest
from lavatar_jax.errors import UserError
from tests.tools.videos import FRAMES, OPTIONS, film, prepare, speech, told
from tools import prepare_data
from tools.real_clips import Job
from tools.real_encode import ClipEncoder
from tools.real_sources import Source, find_sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def videos(faces: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    one, other = faces
    seconds = FRAMES / 25
    good = film(folder / "sub" / "good.mp4", one, speech(seconds))
    good.with_suffix(".txt").write_text("a person  nodding\n", encoding="utf-8")
    film(folder / "fast.mkv", np.repeat(one, 2, axis=0), speech(seconds), fps=50)
    (folder / "fast.txt").write_bytes("größer".encode("latin-1"))
    film(folder / "two shots.mp4", np.concatenate([one, other]), speech(2 * seconds))
    film(folder / "short shot.mp4", np.concatenate([one, other[:20]]), speech(seconds + 0.8))
    film(folder / "two people.mp4", np.concatenate([one, other], axis=2), speech(seconds))
    film(folder / "slow.mp4", one[::2], speech(seconds), fps=12)
    film(folder / "mute.mp4", one, None)
    film(folder / "silent.mp4", one, np.zeros_like(speech(seconds)))
    film(folder / "no one.mp4", np.full_like(one, 120), speech(seconds))
    far = np.pad(one[:, ::6, ::6], [(0, 0), (128, 129), (128, 129), (0, 0)])
    film(folder / "far away.mp4", far, speech(seconds))
    (folder / "cut off.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "notes.pdf").write_bytes(b"not asked for")
    with tarfile.open(folder / "web.tar", "w") as tar:
        tar.add(good, "000.mp4")
        for name, data in (("000.txt", b"inside of a tar"), ("000.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / "broken.tar").write_bytes(b"nonsense" * 200)
    return folder


def test_good_videos_become_records_and_bad_ones_are_named(
    videos: Path, cheap_encoder: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("cv2", reason="finding faces needs opencv-python-headless")
    out = tmp_path / "shards"
    assert prepare(videos, "--out", out, *OPTIONS) == 0
    videos_told = {
        video["name"]: video for video in map(json.loads, (out / "videos.jsonl").read_text().splitlines())
    }
    reasons = {name: [reason for _, reason in video["dropped"]] for name, video in videos_told.items()}
    assert reasons == {
        "sub/good.mp4": [],
        "fast.mkv": [],
        "two shots.mp4": [],
        "short shot.mp4": ["shot too short"],
        "two people.mp4": ["several faces"],
        "slow.mp4": ["too few frames a second"],
        "mute.mp4": ["no sound"],
        "silent.mp4": ["silent"],
        "no one.mp4": ["no face"],
        "far away.mp4": reasons["far away.mp4"],
        "cut off.mp4": ["not a video, or damaged"],
        "text.mp4": ["not a video, or damaged"],
        "empty.mp4": ["not a video, or damaged"],
        "web.tar/000.mp4": [],
        "broken.tar": ["not a tar, or damaged"],
    }
    assert reasons["far away.mp4"][0] in ("face too small", "no face")
    assert videos_told["fast.mkv"]["notes"] == ["caption is not UTF-8"]
    assert videos_told["slow.mp4"]["fps"] == pytest.approx(12, abs=0.1)

    rows = read_manifest(out)
    kept = {name: [row["id"] for row in rows if row["video"] == name] for name in videos_told}
    assert {name for name, ids in kept.items() if ids} == {
        "sub/good.mp4", "fast.mkv", "two shots.mp4", "short shot.mp4", "web.tar/000.mp4",
    }  # fmt: skip
    first = next(row for row in rows if row["video"] == "sub/good.mp4")
    assert (first["start"], first["end"]) == (0.2, 0.68)  # behind 5 frames of its past
    captions = {row["video"]: row["caption"] for row in rows}
    assert captions["sub/good.mp4"] == "a person nodding"
    assert captions["web.tar/000.mp4"] == "inside of a tar"
    assert captions["fast.mkv"] == "a person talking"
    page = (out / "report.html").read_text()
    for name in ("cut off.mp4", "mute.mp4", "broken.tar", "caption is not UTF-8", "several faces"):
        assert name in page
    assert "data:image/jpeg;base64" in page
    assert not (out / ".work").exists()

    source = ShardSource(out, text_len=16, text_dim=64)
    batch = next(record_batches(source, batch=4, seed=0))
    assert batch["latent"].shape == (4, 3, 16, 16, 16)
    assert batch["motion"].shape == (4, 2, 16, 16, 16)
    assert batch["audio"].shape == (4, 1, 1, 192, 12)

    capsys.readouterr()
    before = (out / "manifest.jsonl").read_bytes()
    assert prepare(videos, "--out", out, *OPTIONS) == 0  # nothing is left to do
    assert (out / "manifest.jsonl").read_bytes() == before
    assert prepare(videos, "--out", out, *OPTIONS, "--blocks", "2") == 2
    assert "another length" in capsys.readouterr().err


def test_the_clip_shows_the_face_in_step_with_the_sound(
    videos: Path, faces: list[np.ndarray], cheap_encoder: None, tmp_path: Path
):
    folder = tmp_path / "videos"
    folder.mkdir()
    sound = speech(FRAMES / 25)
    sound[: 40 * 640] = 0  # speech begins with frame 40
    film(folder / "late.mp4", faces[0], sound)
    assert prepare(folder, "--out", tmp_path / "shards", "--faces", "any", *OPTIONS) == 0
    source = ShardSource(tmp_path / "shards", text_len=16, text_dim=64)
    records = {str(source.ids[i]): source.record(i) for i in range(len(source))}
    assert sorted(records) == [f"late.mp4-{start:06d}" for start in (0, 12, 24, 36)]
    loud = records["late.mp4-000024"]["audio"].astype(np.float32).mean(axis=(0, 1))
    assert np.ptp(loud[:8]) < 0.1  # this clip's frames are 29 .. 40, and features look two frames ahead
    assert loud[11] > loud[0] + 0.5
    assert np.ptp(records["late.mp4-000012"]["audio"].astype(np.float32)) < 0.1  # silence
    # Frame 5 begins the first clip; the picture is the middle of the video, half its height.
    latent = records["late.mp4-000000"]["latent"][0, ..., :3].astype(np.float32)
    truth = faces[0][8].astype(np.float32) / 127.5 - 1
    centre = latent[6:10, 6:10].mean(axis=(0, 1))
    assert np.abs(centre - truth[96:144, 104:152].mean(axis=(0, 1))).max() < 0.2


def test_workers_give_the_same_records_and_a_killed_run_goes_on(
    videos: Path, cheap_encoder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.mp4").symlink_to(videos / "sub" / "good.mp4")
    (folder / "c.mp4").write_text("no video")
    options = ("--faces", "any", *OPTIONS)
    assert prepare(folder, "--out", tmp_path / "one", *options) == 0
    assert prepare(folder, "--out", tmp_path / "two", *options, "--workers", "1") == 0
    expected = (tmp_path / "one" / "manifest.jsonl").read_text()
    assert (tmp_path / "two" / "manifest.jsonl").read_text() == expected

    records = ClipEncoder.records

    def interrupted(self, outcome, *args):
        if outcome.name == "b.mp4":
            raise KeyboardInterrupt
        yield from records(self, outcome, *args)

    monkeypatch.setattr(ClipEncoder, "records", interrupted)
    assert prepare(folder, "--out", tmp_path / "three", *options) == 130
    assert told(tmp_path / "three") == ["a.mp4"]
    with pytest.raises(UserError, match="not finished"):
        ShardSource(tmp_path / "three", text_len=16, text_dim=64)
    monkeypatch.setattr(ClipEncoder, "records", records)
    assert prepare(folder, "--out", tmp_path / "three", *options) == 0
    ids = [row["id"] for row in read_manifest(tmp_path / "three")]
    assert ids == [json.loads(line)["id"] for line in expected.splitlines()]


def test_pictures_without_sound_at_the_end_are_left_out(cheap_encoder: None, tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 255, (1, 128, 128, 3)).astype(np.uint8).repeat(150, axis=0)
    (tmp_path / "in").mkdir()
    film(tmp_path / "in" / "a.mp4", frames, speech(3.0))
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--faces", "any", *OPTIONS) == 0
    (video,) = [json.loads(line) for line in (tmp_path / "out" / "videos.jsonl").read_text().splitlines()]
    assert [reason for _, reason in video["dropped"]] == ["the sound ends before the pictures"]
    ends = [row["end"] for row in read_manifest(tmp_path / "out")]
    assert 2.0 < max(ends) < 3.2


def test_what_is_too_short_for_a_record_is_named(
    cheap_encoder: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (1, 128, 128, 3)).astype(np.uint8)
    frames = np.concatenate([picture.repeat(80, axis=0), (picture // 4).repeat(60, axis=0)])
    film(tmp_path / "in" / "a.mp4", frames, speech(len(frames) / 25))
    options = ("--faces", "any", *OPTIONS, "--filters.reference-gap", "2")
    command = (tmp_path / "in", "--out", tmp_path / "out", *options)
    assert prepare(*command) == 0
    (video,) = [json.loads(line) for line in (tmp_path / "out" / "videos.jsonl").read_text().splitlines()]
    # 5 frames of the past, 12 of the clip, 50 of the gap and the reference.
    assert video["dropped"][0] == ["3.2 - 5.6 s", "shot too short for a record, which takes 2.72 s"]
    starts = [row["start"] for row in read_manifest(tmp_path / "out")]
    lost = [place for place, reason in video["dropped"] if reason == "clip without a reference picture"]
    assert starts == [0.2, 2.6]
    assert (lost[0], len(lost)) == ("0.7 - 1.2 s", 4)
    assert "clip without a reference picture" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    assert prepare(*command, "--filters.seconds", "2", "2.6") == 2
    assert (
        "pieces of at most 2.6 s (--filters.seconds) give no record, which takes 2.72 s"
        in capsys.readouterr().err
    )


def test_odd_names_are_only_names(cheap_encoder: None, tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 255, (1, 128, 128, 3)).astype(np.uint8).repeat(70, axis=0)
    deep = tmp_path / "in" / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    good = film(deep / "long.mp4", frames, speech(2.8))
    for name in (b"latin-\xe9.mp4", "line\u2028end\u0085.mp4".encode()):
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(good.read_bytes())
    for _ in range(2):  # the second time all is known
        assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--faces", "any", *OPTIONS) == 0
        names = {row["video"] for row in read_manifest(tmp_path / "out")}
        assert names == {"latin-\\xe9.mp4", "line\u2028end\u0085.mp4", f"{'d' * 120}/{'e' * 120}/long.mp4"}


def test_what_a_user_gets_wrong_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "useless").mkdir()
    (tmp_path / "useless" / "a.mp4").write_text("no video")
    out = ("--out", tmp_path / "shards", "--workers", "0")
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / RENDERED).write_text("{}")
    drawn = ("--out", tmp_path / "drawn", "--faces", "any")
    cases = (
        ((tmp_path / "none", *out), "no such folder"),
        ((tmp_path / "empty", *out), "has no videos"),
        ((tmp_path / "useless", *out, "--faces", "my:detector"), "no face detector my:detector"),
        ((tmp_path / "useless", *out, "--faces", "any", "--model", "none"), "no such model folder"),
        ((tmp_path / "useless", *out, "--faces", "any", "--motion-frames", "8"), "1 + 4k"),
        ((tmp_path / "useless", *out, "--faces", "any"), "none of 1 videos gave a clip"),
        ((tmp_path / "useless", *drawn), "holds rendered clips"),
        ((), "--out"),
    )
    for args, message in cases:
        assert prepare(*args) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert prepare(tmp_path / "useless", *out) == 2
    assert "pip install 'lavatar-jax[data]'" in capsys.readouterr().err


def test_sources_are_sorted_and_named_by_their_place(videos: Path):
    sources, broken = find_sources(videos)
    assert Source("web.tar/000.mp4", videos / "web.tar", "000.mp4", captioned=True) in sources
    assert broken == {"broken.tar": "not a tar, or damaged"}
    assert len({source.name for source in sources}) == len(sources)


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no signals")
def test_ctrl_c_ends_the_workers_and_exits_with_130(videos: Path, tmp_path: Path):
    command = [sys.executable, "tools/prepare_data.py", str(videos), "--out", str(tmp_path / "shards")]
    options = {
        "start_new_session": True,
        "stderr": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
        "text": True,
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [*command, "--faces", "any", *OPTIONS, "--workers", "1"], cwd=ROOT, env=environment, **options
    ) as process:
        work = tmp_path / "shards" / ".work"
        deadline = time.monotonic() + 120
        while not any(work.glob("*/*.npy")) and time.monotonic() < deadline:
            time.sleep(0.2)
        begun = any(work.glob("*/*.npy"))
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=120)[1]
        assert begun
        assert process.returncode == 130, error
    assert not (tmp_path / "shards" / ".work").exists()
    assert (tmp_path / "shards" / "report.html").exists()


def test_a_video_that_kills_its_process_is_named_and_the_others_are_not_lost(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "crashing_detector.py").write_text(
        "import os\n"
        "from lavatar_jax.data.face_boxes import whole_picture\n"
        "def detect(picture):\n"
        "    return os._exit(9) if picture.std() < 5 else whole_picture(picture)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    filters = FilterConfig(seconds=(2, 30))
    jobs = [
        Job(Source(name, videos / name), tmp_path / "work", ((64, 64),), "crashing_detector:detect", filters)
        for name in ("sub/good.mp4", "no one.mp4", "two people.mp4")
    ]
    outcomes = list(prepare_data.cut_all(jobs, 1))
    assert [(o.name, len(o.pieces), [reason for _, reason in o.dropped]) for o in outcomes] == [
        ("sub/good.mp4", 1, []),
        ("no one.mp4", 0, ["crashed the decoder"]),
        ("two people.mp4", 1, []),
    ]
