"""Pictures of real videos for stage 0: which are cut out, and what stands in for those that are damaged."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.data.clips import WEIGHT_STEP, ClipsConfig
from lavatar_jax.data.pixels import FACE_WEIGHT, PixelSource, pixel_batches
from lavatar_jax.data.record_folder import CorruptRecordError
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.errors import UserError

SIZES = ((9, 128, 256), (9, 256, 128), (9, 128, 256), (9, 128, 256))  # frames, rows, columns
FACE = (0.25, 0.5, 0.75, 0.75)  # top, left, bottom, right
CROPS = ClipsConfig(crop_size=16, crop_frames=5, full_share=0.0)


def picture(number: int, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> np.ndarray:
    """Red tells the record and the frame, green the row, blue the column."""
    t, y, x = np.meshgrid(*(np.arange(side) for side in sizes[number]), indexing="ij")
    return np.stack([20 * number + t, y, x], axis=-1).astype(np.uint8)


def write(
    folder: Path,
    *,
    pixels: int = 9,
    sizes: tuple[tuple[int, int, int], ...] = SIZES,
    videos: tuple[str, ...] = ("a", "b", "c", "d"),
) -> Path:
    empty = np.zeros((1, 2, 2, 4), np.float16)
    with ShardWriter(folder) as writer:
        for number, video in enumerate(videos[: len(sizes)]):
            record = {
                "id": f"clip-{number}", "caption": "", "latent": empty, "reference": empty,
                "audio": np.zeros((1, 4, 4), np.float16),
            }  # fmt: skip
            if pixels:
                record |= {"pixels": picture(number, sizes)[:pixels], "face": np.array(FACE, np.float32)}
            writer.write(record, video=video)
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={})
    return folder


def test_crops_are_of_pictures_of_all_sizes_and_mostly_of_faces(tmp_path: Path):
    batches = pixel_batches(PixelSource(write(tmp_path)), CROPS, crops=4, whole=1)
    seen, near = set(), 0
    for _ in range(25):
        batch = next(batches)
        assert batch["video"].shape == (4, 5, 16, 16, 3)
        assert batch["weight"].shape == (4, 5, 4, 4)
        for video, weight, number in zip(batch["video"], batch["weight"], batch["record"], strict=True):
            seen.add(int(number))
            red, top, left = (int(video[..., colour].min()) for colour in range(3))
            place = picture(number)[red - 20 * number :][:5, top : top + 16, left : left + 16]
            assert any(np.array_equal(video[:, :, ::way], place) for way in (1, -1))
            middle = (np.array([top, left]) + 8) / SIZES[number][1:]
            near += bool(np.all((middle > FACE[:2]) & (middle < FACE[2:])))
            assert set(np.unique(weight)) <= {1 / WEIGHT_STEP, FACE_WEIGHT / WEIGHT_STEP}
    assert seen == {0, 1, 2, 3}
    assert near > 40, "an eighth of all places is in the face"


def test_whole_pictures_of_one_size_share_a_batch(tmp_path: Path):
    config = ClipsConfig(crop_size=16, crop_frames=5, full_share=1.0)
    source = PixelSource(write(tmp_path))
    batches = pixel_batches(source, config, crops=4, whole=2)
    shapes = [next(batches)["video"].shape for _ in range(40)]
    assert {shape[1:4] for shape in shapes} == {*SIZES}
    assert shapes.count((2, 9, 256, 128, 3)) == 10  # a quarter of the records
    weight = source[0]["weight"][0] * WEIGHT_STEP
    inside = np.zeros((32, 64), bool)
    inside[8:24, 32:48] = True
    np.testing.assert_array_equal(weight, np.where(inside, FACE_WEIGHT, 1.0))


def test_processes_and_workers_share_the_batches_of_one(tmp_path: Path):
    source, config = PixelSource(write(tmp_path)), dataclasses.replace(CROPS, full_share=0.5)
    whole, *halves = (
        pixel_batches(source, config, crops=4, whole=2, workers=workers) for workers in (0, 0, 1)
    )
    for part, half in enumerate(halves):
        half.take_part(part, 2)
    try:
        shapes = set()
        for _ in range(6):
            parts, batch = [next(half) for half in halves], next(whole)
            shapes.add(batch["video"].shape[:2])
            for name, value in batch.items():
                np.testing.assert_array_equal(value, np.concatenate([half[name] for half in parts]))
        assert shapes == {(4, 5), (2, 9)}
    finally:
        halves[1].close()
    resumed = pixel_batches(source, config, crops=4, whole=2)
    resumed.set_state(whole.get_state())
    expected, found = next(whole), next(resumed)
    for name, value in expected.items():
        np.testing.assert_array_equal(value, found[name])


@pytest.mark.parametrize("full_share", [0.0, 1.0])
def test_another_record_stands_in_for_a_damaged_one(
    full_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "skipped.jsonl"
    source = PixelSource(write(tmp_path / "records"), skipped_log=log)
    intact = source.record

    def record(number: int):
        if number == 2:
            raise CorruptRecordError("damaged")
        return intact(number)

    monkeypatch.setattr(source, "record", record)
    config = dataclasses.replace(CROPS, full_share=full_share)
    batches = pixel_batches(source, config, crops=4, whole=2)
    seen = {int(number) for _ in range(12) for number in next(batches)["record"]}
    assert seen == {0, 1, 3}
    assert source.skipped == {"clip-2": "damaged"}
    assert "clip-2" in log.read_text()


def test_what_is_held_out_is_in_no_batch_nor_is_its_video(tmp_path: Path):
    source = PixelSource(write(tmp_path, videos=("a", "b", "c", "b")), held_out=1)
    assert list(source.held_out) == [3]
    batches = pixel_batches(source, CROPS, crops=4, whole=1)
    assert {int(number) for _ in range(6) for number in next(batches)["record"]} == {0, 2}


def test_records_without_pictures_are_no_use_to_stage_0(tmp_path: Path):
    with pytest.raises(UserError, match=r"keeps no pictures for stage 0: prepare the videos with --pixels"):
        PixelSource(write(tmp_path, pixels=0))
