"""Reading images of every kind, refusing what is none, and the reference's sizing and cropping."""

import errno
import struct
import zlib
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from lavatar_jax.errors import UserError
from lavatar_jax.inference.images import (
    cover_and_crop,
    load_image,
    resize_and_crop,
    size_less_than_area,
    video_size,
)
from tests.shared import golden


@pytest.fixture
def picture() -> np.ndarray:
    """Red above, blue below, 20 wide and 30 high: which way is up can be seen."""
    image = np.zeros((30, 20, 3), np.uint8)
    image[:15, :, 0] = 255
    image[15:, :, 2] = 255
    return image


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".gif", ".tiff"])
def test_common_formats(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"face{suffix}"
    Image.fromarray(picture).save(path)
    image = load_image(path)
    assert image.shape == (30, 20, 3)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image[[4, 25]].astype(int), picture[[4, 25]], atol=16)


def test_exif_rotation_is_undone(tmp_path: Path, picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    Image.fromarray(np.rot90(picture)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "turned.png"), picture)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(load_image(tmp_path / "alpha.png")[:, 0, 0], [0, 0, 255, 255])
    np.testing.assert_array_equal(load_image(tmp_path / "palette.png")[0], [[255, 0, 0], [255, 255, 255]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_of_8_and_16_bits(tmp_path: Path, dtype: type) -> None:
    ramp = np.linspace(0, np.iinfo(dtype).max, 64).astype(dtype).reshape(1, 64).repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    image = load_image(tmp_path / "grey.png")
    np.testing.assert_allclose(image[0, :, 1], np.linspace(0, 255, 64), atol=1)


def test_other_colour_spaces(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.new("1", (4, 4), 1).save(tmp_path / "fax.png")
    assert load_image(tmp_path / "print.jpg")[0, 0].tolist() == pytest.approx([254, 0, 0], abs=4)
    assert load_image(tmp_path / "fax.png").min() == 255


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and carries next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such image"),
        (b"", "empty"),
        (b"this is a letter\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (png_header(60_000, 60_000), "million pixels"),
        (png_header(12_000, 12_000), "million pixels"),
        (png_header(64, 64), "not an image, or is damaged"),
    ],
    ids=["missing", "empty", "text", "signature only", "huge bomb", "bomb", "no pixels"],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "face.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        load_image(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"half{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged"):
        load_image(path)


@hypothesis.given(
    data=st.binary(max_size=64), start=st.sampled_from([b"", b"\xff\xd8\xff", b"GIF89a", b"RIFF"])
)
def test_garbage_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "x.png"
    path.write_bytes(start + data)
    with pytest.raises(UserError):
        load_image(path)


def test_golden_sizes() -> None:
    case, _, _ = golden("12_size_preprocess")
    assert len(case["rows"]) == 70
    for row in case["rows"]:
        assert size_less_than_area(row["h"], row["w"], row["max_area"]) == (row["H"], row["W"]), row


def test_golden_resize_and_crop_geometry() -> None:
    """A white image: black bars and crops of the golden rows must be where they are said to be."""
    case, _, _ = golden("12_size_preprocess")
    for row in case["rows"]:
        image = resize_and_crop(np.full((row["h"], row["w"], 3), 255, np.uint8), row["H"], row["W"])
        left, right, top, bottom = row["pad_lrtb"]
        expected = np.zeros((row["H"], row["W"], 3), np.uint8)
        expected[top : row["H"] - bottom, left : row["W"] - right] = 255
        np.testing.assert_array_equal(image, expected, err_msg=str(row))


def test_golden_pixels() -> None:
    case, inputs, outputs = golden("12_size_preprocess")
    pixels = resize_and_crop(inputs["image"], *case["image_target"]).astype(np.float32) / 255 * 2 - 1
    worst = np.abs(pixels.transpose(2, 0, 1) - outputs["ref_pixel_values"]).max()
    assert worst <= case["tolerance"]["image"]["atol"]


@hypothesis.given(
    h=st.integers(16, 6000), w=st.integers(16, 6000), area=st.sampled_from([98304, 270336, 720896])
)
def test_sizes_fit_and_are_multiples_of_64(h: int, w: int, area: int) -> None:
    hypothesis.assume(max(h, w) / min(h, w) < 20)
    height, width = size_less_than_area(h, w, area)
    assert height * width <= area
    assert height % 64 == width % 64 == 0
    assert min(height, width) >= 64


@pytest.mark.parametrize("name", [300 * "x", "a\0b"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UserError, match="no such image file"):
        load_image(name)


def test_a_picture_behind_a_closed_door(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "stat", closed)  # root may go everywhere
    with pytest.raises(UserError, match="not allowed to look into its folder"):
        load_image("somebody/face.png")


def test_long_and_narrow_pictures_are_refused() -> None:
    """Before they are scaled to gigabytes, for a video of a fixed square too."""
    strip = np.zeros((1, 100_000, 3), np.uint8)
    for refuse in (lambda: cover_and_crop(strip, 64, 64), lambda: video_size(strip, 128)):
        with pytest.raises(UserError, match="an image of 100000x1 is too long and narrow"):
            refuse()


def test_extreme_proportions_are_refused() -> None:
    with pytest.raises(UserError, match="crop it"):
        size_less_than_area(300_000, 1, 98304)


@hypothesis.given(h=st.integers(1, 200), w=st.integers(1, 200))
def test_cover_has_no_bars(h: int, w: int) -> None:
    image = cover_and_crop(np.full((h, w, 3), 255, np.uint8), 64, 48)
    assert image.shape == (64, 48, 3)
    assert image.min() == 255


def test_cover_takes_the_middle() -> None:
    image = np.zeros((50, 150, 3), np.uint8)
    image[:, 50:100] = 200
    np.testing.assert_array_equal(cover_and_crop(image, 50, 50), np.full((50, 50, 3), 200, np.uint8))
