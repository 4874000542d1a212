"""Videos that several machines prepared, each its share, become one folder of records."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.cli import run
from lavatar_jax.data.loader import ShardSource
from lavatar_jax.data.negative_prompt import write_negative
from lavatar_jax.data.shards import DATASET, PREPARED, read_dataset
from tests.tools.videos import film, speech
from tools import join_data, prepare_data

OPTIONS = (
    "--workers", "0", "--blocks", "1", "--motion-frames", "5", "--faces", "any",
    "--filters.seconds", "1", "30", "--filters.reference-gap", "0.2",
)  # fmt: skip
PARTS = 3
NAMES = ("text.mp4", *(f"{number}.mp4" for number in range(7)))


def prepare(*args: str | Path) -> int:
    return run(lambda: prepare_data.main([*map(str, args), *OPTIONS]))


def join(*args: str | Path) -> int:
    return run(lambda: join_data.main([str(arg) for arg in args]))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Seven videos, of which a share has at least one."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / NAMES[0]).write_text("this is no video")
    for number, name in enumerate(NAMES[1:]):
        film(folder / name, np.full((30, 128, 128, 3), 20 * number, np.uint8), speech(1.2))
    return folder


@pytest.fixture
def parts(videos: Path, cheap_encoder: None, tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"part-{number}" for number in range(1, PARTS + 1)]
    for number, folder in enumerate(folders, start=1):
        assert prepare(videos, "--out", folder, "--part", f"{number}/{PARTS}") == 0
    return folders


def contents(folder: Path) -> dict[str, np.ndarray]:
    source = ShardSource(folder, text_len=4, text_dim=4)
    return {name: np.asarray(source.record(number)["latent"]) for number, name in enumerate(source.ids)}


def test_parts_are_the_same_records_as_one_folder(
    videos: Path, parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(videos, "--out", tmp_path / "alone") == 0
    out = tmp_path / "all"
    assert join(*parts, "--out", out) == 0
    assert f"{out}: 14 records of 3 folders" in capsys.readouterr().out
    assert all(read_dataset(part).records < 14 for part in parts)
    for part in parts:  # their shards have another name now
        shutil.rmtree(part)

    alone, joined = contents(tmp_path / "alone"), contents(out)
    assert joined.keys() == alone.keys()
    for name, latent in alone.items():
        np.testing.assert_array_equal(joined[name], latent, strict=True)
    assert read_dataset(out) == read_dataset(tmp_path / "alone")
    assert "<b>14</b> records" in (out / "report.html").read_text()
    assert "text.mp4" in (out / "report.html").read_text()
    assert len(list((out / "pictures").iterdir())) == 7
    assert not list(tmp_path.glob("*.partial"))

    film(videos / "later.mp4", np.full((30, 128, 128, 3), 200, np.uint8), speech(1.2))
    assert prepare(videos, "--out", out) == 0  # goes on as if it had made the folder
    more = contents(out).keys() - alone.keys()
    assert len(more) == 2
    assert all(name.startswith("later.mp4-") for name in more)


def test_what_does_not_belong_together_is_one_line(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(parts[1], tmp_path / name)

    unfinished, foreign, other, prompted, lost = map(copy, ("unfinished", "foreign", "other", "told", "lost"))
    (unfinished / DATASET).unlink()
    (foreign / PREPARED).unlink()
    settings = json.loads((other / PREPARED).read_text())
    (other / PREPARED).write_text(json.dumps(settings | {"motion_frames": 9}))
    write_negative(prompted, "blurred", np.ones((2, 4)))
    next(lost.glob("shard-*")).unlink()
    for others, message in (
        ([], "give two folders or more"),
        ([unfinished], "dataset.json is missing"),
        ([foreign], f"{foreign} was not made by tools/prepare_data.py"),
        ([other], f"{other} was prepared with motion_frames 9, {parts[0]} with 5"),
        ([prompted], f"{prompted} and {parts[0]} have different negative prompts ('blurred', None)"),
        ([lost], "array_record is missing: run tools/prepare_data.py on"),
        ([parts[1], copy("twin")], "both have a record"),
        ([tmp_path / "nowhere"], "no such folder"),
    ):
        assert join(parts[0], *others, "--out", tmp_path / "all") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (parts[0] / PREPARED).write_text("half a fi")
    assert join(*parts, "--out", tmp_path / "all") == 2
    assert f"{parts[0] / PREPARED}" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert join(*parts, "--out", parts[0]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not list(tmp_path.glob("all*"))


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/0", "a/b", "-1/2"])
def test_a_share_is_one_of_several(part: str, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(videos, "--out", videos.parent / "out", f"--part={part}") == 2
    assert f"--part {part}: give a number and how many there are" in capsys.readouterr().err


def test_a_share_of_no_videos_is_said(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = next(k for k in range(1, 1001) if not any(map(prepare_data.share(f"{k}/1000"), NAMES)))
    assert prepare(videos, "--out", videos.parent / "out", "--part", f"{empty}/1000") == 2
    assert f"--part {empty}/1000 has none of the 8 videos" in capsys.readouterr().err
    assert not (videos.parent / "out").exists()
