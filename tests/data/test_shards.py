import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.data.records import decode_record, encode_record
from lavatar_jax.data.shards import ShardWriter, read_dataset, read_manifest, stored_records
from lavatar_jax.errors import UserError


def make_record(number: int) -> dict[str, np.ndarray | str]:
    latent = np.random.default_rng(number).normal(size=(3, 2, 2, 4)).astype(np.float16)
    return {
        "id": f"clip-{number}", "caption": "größer", "latent": latent, "reference": latent[:1],
        "audio": np.zeros((1, 5, 12), np.float16), "mouth": np.arange(4, dtype=np.uint8).reshape(2, 2),
    }  # fmt: skip


def test_a_record_comes_back_as_it_was():
    record = make_record(0)
    again = decode_record(encode_record(record))
    assert again.keys() == record.keys()
    for name, value in record.items():
        np.testing.assert_array_equal(again[name], value)
        if isinstance(value, np.ndarray):
            assert again[name].dtype == value.dtype


def test_records_that_would_harm_are_refused():
    record = make_record(0)
    with pytest.raises(ValueError, match="needs audio"):
        encode_record({name: value for name, value in record.items() if name != "audio"})
    with pytest.raises(ValueError, match="reference of record clip-0 is not finite"):
        encode_record({**record, "reference": np.full((1, 2, 2, 4), np.inf, np.float16)})
    for foreign in (b"", b"hello", b"\x93\x01\x02\x03", encode_record(record)[:-5]):
        with pytest.raises(ValueError, match="not a training record"):
            decode_record(foreign)


def test_the_manifest_tells_what_is_where(tmp_path: Path):
    with ShardWriter(tmp_path, shard_records=2) as writer:
        for number in range(3):
            writer.write(make_record(number), fps=25)
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={"vae": "tiny"})
    rows = read_manifest(tmp_path)
    assert [(row["id"], row["shard"], row["offset"]) for row in rows] == [
        ("clip-0", "shard-00000.array_record", 0),
        ("clip-1", "shard-00000.array_record", 1),
        ("clip-2", "shard-00001.array_record", 0),
    ]
    assert rows[0]["frames"] == 12
    assert rows[0]["fps"] == 25
    assert rows[0]["caption"] == "größer"
    assert rows[0]["shapes"]["latent"] == [3, 2, 2, 4]
    assert [record["id"] for record in stored_records(tmp_path, rows)] == ["clip-0", "clip-1", "clip-2"]
    assert read_dataset(tmp_path).encoder == {"vae": "tiny"}


def test_a_killed_writer_loses_its_open_shard_only(tmp_path: Path):
    with ShardWriter(tmp_path, shard_records=2) as writer:
        for number in range(4):
            writer.write(make_record(number))
    # Killed between the manifest and the shard's name, and in the middle of a line.
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines(keepends=True)
    lost = json.loads(lines[0]) | {"id": "lost", "shard": "shard-00002.array_record"}
    (tmp_path / "manifest.jsonl").write_text("".join(lines) + json.dumps(lost) + '\n{"id": "ha')
    (tmp_path / ".shard-00002.array_record.part").write_bytes(b"half")
    with ShardWriter(tmp_path, shard_records=2) as writer:
        assert writer.ids == {f"clip-{number}" for number in range(4)}
        assert not (tmp_path / ".shard-00002.array_record.part").exists()
        with pytest.raises(UserError, match="another process"):
            ShardWriter(tmp_path)
        with pytest.raises(ValueError, match="already"):
            writer.write(make_record(1))
        writer.write(make_record(4))
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={})
    assert [row["id"] for row in read_manifest(tmp_path)] == [f"clip-{number}" for number in range(5)]
    assert read_dataset(tmp_path).records == 5


def test_shards_of_other_writers_may_have_other_names(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        writer.write(make_record(0))
    (tmp_path / "shard-00000.array_record").rename(tmp_path / "mine.array_record")
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("shard-00000", "mine"))
    with ShardWriter(tmp_path) as writer:
        writer.write(make_record(1))
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={})
    rows = read_manifest(tmp_path)
    assert [row["shard"] for row in rows] == ["mine.array_record", "shard-00000.array_record"]
    assert [record["id"] for record in stored_records(tmp_path, rows)] == ["clip-0", "clip-1"]


def test_a_shard_whose_completion_failed_is_completed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a full disk, with half of a line in the manifest."""
    with ShardWriter(tmp_path, shard_records=2) as writer:
        for number in range(2):
            writer.write(make_record(number))

        def full(descriptor: int) -> None:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 9)
            raise OSError(errno.ENOSPC, "No space left on device")

        writer.write(make_record(2))
        monkeypatch.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(UserError, match="No space left"):
                writer.flush()
        assert len(read_manifest(tmp_path)) == 2
        monkeypatch.undo()
        writer.write(make_record(3))  # first completes the other shard
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={})
    rows = read_manifest(tmp_path)
    assert [(row["id"], row["shard"][6:11]) for row in rows] == [
        ("clip-0", "00000"), ("clip-1", "00000"), ("clip-2", "00001"), ("clip-3", "00002")
    ]  # fmt: skip
    assert [record["id"] for record in stored_records(tmp_path, rows)] == [f"clip-{n}" for n in range(4)]


def test_a_folder_that_lost_a_shard_is_unfinished_for_its_next_writer(tmp_path: Path):
    with ShardWriter(tmp_path, shard_records=1) as writer:
        for number in range(3):
            writer.write(make_record(number))
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={})
    (tmp_path / "shard-00001.array_record").unlink()
    with ShardWriter(tmp_path) as writer:
        assert writer.ids == {"clip-0", "clip-2"}
        with pytest.raises(UserError, match="not finished"):
            read_dataset(tmp_path)
        writer.write(make_record(1))
        writer.finish(mean=np.zeros(4), std=np.ones(4), encoder={})
    assert read_dataset(tmp_path).records == 3
