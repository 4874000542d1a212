"""Result files: refused early, written atomically; and the contact sheet that goes into one."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavatar_jax.errors import UserError
from lavatar_jax.inference.contact_sheet import ContactSheet, tile
from lavatar_jax.inference.output import check_output, write_png


def test_a_good_name_passes(tmp_path: Path) -> None:
    assert check_output(str(tmp_path / "a.mp4"), ".mp4") == tmp_path / "a.mp4"
    assert check_output(tmp_path / "A.MP4", ".mp4") == tmp_path / "A.MP4"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "folder"),
        ("no/a.mp4", "no folder"),
        ("a.avi", "mp4"),
        (300 * "x" + ".mp4", "too long"),
        (245 * "x" + ".mp4", "too long"),
    ],
)
def test_bad_names_are_refused(tmp_path: Path, name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_output(tmp_path / name, ".mp4")


def test_a_protected_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="not allowed"):
        check_output(tmp_path / "a.mp4", ".mp4")


def test_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UserError, match="disk is full"):
        write_png(tmp_path / "b.png", image)
    assert os.listdir(tmp_path) == ["a.png"]


def test_tiles_stand_row_by_row() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 4, 3), np.uint8)
    sheet = tile(images, 2)
    assert sheet.shape == (4, 8, 3)
    assert sheet[::2, ::4, 0].tolist() == [[0, 1], [2, 255]]


@pytest.mark.parametrize(("total", "shown"), [(1, 1), (10, 10), (24, 24), (1000, 24)])
@pytest.mark.parametrize("block", [1, 12, 100])
def test_sheet_shows_first_to_last(total: int, shown: int, block: int) -> None:
    video = np.repeat(np.arange(total, dtype=np.uint16), 3).view(np.uint8).reshape(total, 1, 2, 3)
    sheet = ContactSheet(total)
    for start in range(0, total, block):
        sheet.add(video[start : start + block])
    columns = min(6, shown)
    tiles = sheet.image().reshape(-1, 1, columns, 2, 3).swapaxes(1, 2).reshape(-1, 1, 2, 3)
    np.testing.assert_array_equal(tiles[0], video[0])
    np.testing.assert_array_equal(tiles[shown - 1], video[-1])


def test_sheet_of_an_interrupted_video() -> None:
    sheet = ContactSheet(1000)
    sheet.add(np.zeros((100, 2, 2, 3), np.uint8))
    assert sheet.image().shape == (2, 12, 3)
