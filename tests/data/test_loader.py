import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lavatar_jax.data.loader import ShardSource, record_batches
from lavatar_jax.data.negative_prompt import write_negative
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.errors import UserError
from lavatar_jax.models.words import encode_words

RECORDS, SHARD = 23, 8
CHANNELS = 4


def make_record(number: int, height: int = 4, frames: int = 3) -> dict[str, np.ndarray | str]:
    random = np.random.default_rng(number)
    return {
        "id": f"clip-{number}",
        "caption": "smiling" if number % 2 else "a person, nodding",
        "latent": (3 + 2 * random.normal(size=(frames, height, 4, CHANNELS))).astype(np.float16),
        "reference": (3 + 2 * random.normal(size=(1, height, 4, CHANNELS))).astype(np.float16),
        "audio": random.normal(size=(2, 5, 4 * frames)).astype(np.float16),
        "openness": random.uniform(size=4 * frames).astype(np.float16),
        # As real latents are, large beside what ArrayRecord rounds files up to.
        "pose": random.normal(size=(frames, 64, 64, CHANNELS)).astype(np.float16),
    }


def write(folder: Path, records: int = RECORDS, tall: int = 0, videos: tuple[str, ...] = ()) -> Path:
    with ShardWriter(folder, shard_records=SHARD) as writer:
        for number in range(records):
            facts = {"video": videos[number]} if videos else {}
            writer.write(make_record(number, height=6 if number < tall else 4), **facts)
        writer.finish(mean=np.full(CHANNELS, 3.0), std=np.full(CHANNELS, 2.0), encoder={"name": "test"})
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("records"))


def open_source(folder: Path, **options) -> ShardSource:
    return ShardSource(folder, text_len=5, text_dim=6, **options)


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def flip(path: Path, middle: int) -> None:
    data = bytearray(path.read_bytes())
    for i in range(middle, middle + 16):
        data[i] ^= 0xFF
    path.write_bytes(data)


def test_a_batch_has_the_records_normalised_and_in_the_shapes_of_the_losses(prepared: Path):
    source = open_source(prepared)
    batch = next(record_batches(source, batch=4, seed=0))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "latent": ((4, 3, 4, 4, 4), "float32"),
        "reference": ((4, 1, 4, 4, 4), "float32"),
        "audio": ((4, 1, 2, 5, 12), "float32"),
        "text": ((4, 5, 6), "float32"),
        "mouth": ((4, 4, 4), "float32"),
        "openness": ((4, 12), "float32"),
        "pose": ((4, 3, 64, 64, 4), "float32"),
        "record": ((4,), "int32"),
    }
    assert np.all(batch["mouth"] == 1)
    for row, number in enumerate(batch["record"]):
        record = make_record(int(number))
        np.testing.assert_allclose(batch["latent"][row], (record["latent"].astype(np.float32) - 3) / 2)
        np.testing.assert_array_equal(batch["text"][row], encode_words(record["caption"], 5, 6))
        assert source.ids[number] == record["id"]


def test_every_record_comes_once_an_epoch_in_another_order(prepared: Path):
    batches = record_batches(open_source(prepared), batch=1, seed=3)
    epochs = [[int(next(batches)["record"][0]) for _ in range(RECORDS)] for _ in range(2)]
    assert all(sorted(epoch) == list(range(RECORDS)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_no_batch_shows_a_person_of_the_held_out_records(tmp_path: Path):
    folder = write(tmp_path / "videos", records=7, videos=("a", "b", "c", "b", "a", "b", "c"))
    source = open_source(folder, held_out=2)
    batches = record_batches(source, batch=1, seed=0)
    assert {int(next(batches)["record"][0]) for _ in range(4)} == {0, 4}
    assert list(source.held_out) == [5, 6]
    with pytest.raises(UserError, match="hold out fewer"):
        open_source(folder, held_out=3)
    rendered = open_source(write(tmp_path / "rendered", records=5), held_out=2)
    assert [list(bucket.records) for bucket in rendered.buckets] == [[0, 1, 2]]


@pytest.mark.parametrize(("workers", "later"), [(0, 0), (2, 0), (0, 2)])
def test_a_restored_iterator_goes_on_exactly_with_any_workers(prepared: Path, workers: int, later: int):
    source = open_source(prepared)
    straight = record_batches(source, batch=4, seed=1)
    expected = [next(straight) for _ in range(9)]
    batches = record_batches(source, batch=4, seed=1, workers=workers)
    try:
        for want in expected[:3]:
            assert_equal(next(batches), want)  # workers do not change the order
        state = json.loads(json.dumps(batches.get_state()))
    finally:
        batches.close()
    restored = record_batches(source, batch=4, seed=1, workers=later)
    try:
        restored.set_state(state)
        for want in expected[3:]:
            assert_equal(next(restored), want)
    finally:
        restored.close()


@pytest.mark.parametrize(
    "state",
    [
        {"next_index": 3},
        {
            "next_index_in_cycle": 1, "next_index_in_datasets": 2, "iterators_in_use_indices": [0, 1],
            "iterators_in_use_states": [{"next_index": 2}, {"next_index": 1}], "exhausted": [0, 0],
            "future_states": {},
        },
    ],
    ids=["of no workers", "of two workers"],
)  # fmt: skip
def test_an_earlier_checkpoint_has_the_state_of_grains_iterator(prepared: Path, state: dict):
    source = open_source(prepared)
    straight, restored = (record_batches(source, batch=4, seed=1) for _ in range(2))
    restored.set_state(state)
    for _ in range(3):
        next(straight)
    assert_equal(next(restored), next(straight))


def test_two_processes_share_the_batches_of_one(prepared: Path):
    source = open_source(prepared)
    whole = record_batches(source, batch=4, seed=5)
    halves = [record_batches(source, batch=4, seed=5) for _ in range(2)]
    for part, half in enumerate(halves):
        half.take_part(part, 2)
    for _ in range(8):
        parts = [next(half) for half in halves]
        assert_equal(next(whole), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    with pytest.raises(UserError, match="does not split over 3"):
        whole.take_part(0, 3)


def test_a_batch_has_one_latent_size_and_buckets_take_turns_by_their_sizes(tmp_path: Path):
    source = open_source(write(tmp_path / "records", records=24, tall=6))
    assert [(bucket.latent_size, len(bucket.records)) for bucket in source.buckets] == [
        ((3, 6, 4), 6),
        ((3, 4, 4), 18),
    ]
    batches = record_batches(source, batch=2, seed=0)
    heights = [next(batches)["latent"].shape[2] for _ in range(40)]
    assert heights.count(6) == 10
    assert set(heights) == {4, 6}


def test_a_corrupt_record_is_skipped_counted_and_named(prepared: Path, tmp_path: Path, caplog):
    folder, log = tmp_path / "records", tmp_path / "run" / "skipped.jsonl"
    shutil.copytree(prepared, folder)
    shard = folder / "shard-00001.array_record"
    flip(shard, shard.stat().st_size // 3)
    source = open_source(folder, skipped_log=log)
    batches = record_batches(source, batch=1, seed=0)
    seen = [int(next(batches)["record"][0]) for _ in range(2 * RECORDS)]
    (name,) = source.skipped
    number = source.ids.index(name)
    assert SHARD <= number < 2 * SHARD
    assert number not in seen
    assert set(seen) == set(range(RECORDS)) - {number}
    assert "shard-00001.array_record" in source.skipped[name]
    assert caplog.text.count(f"{name} skipped") == 1  # though it was met in two epochs
    assert [json.loads(line)["id"] for line in log.read_text().splitlines()] == [name]
    assert open_source(folder, skipped_log=log).skipped == source.skipped  # known after a restart


@pytest.mark.parametrize("damage", ["truncated", "missing", "emptied", "of other records"])
def test_a_lost_shard_costs_its_records_only(prepared: Path, tmp_path: Path, damage: str):
    folder = tmp_path / "records"
    shutil.copytree(prepared, folder)
    shard = folder / "shard-00001.array_record"
    if damage == "truncated":
        data = shard.read_bytes()
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        shard.unlink()
    elif damage == "emptied":
        shard.write_bytes(b"")
    else:
        shutil.copy(folder / "shard-00000.array_record", shard)
    source = open_source(folder)
    batches = record_batches(source, batch=1, seed=0)
    seen = [int(next(batches)["record"][0]) for _ in range(RECORDS)]
    assert set(seen) == set(range(RECORDS)) - set(range(SHARD, 2 * SHARD))
    assert set(source.skipped) == {f"clip-{number}" for number in range(SHARD, 2 * SHARD)}
    assert max(map(seen.count, seen)) <= 5  # others share the work of standing in


def test_a_folder_where_nothing_can_be_read_is_an_error(prepared: Path, tmp_path: Path):
    folder = tmp_path / "records"
    shutil.copytree(prepared, folder)
    for shard in folder.glob("*.array_record"):
        shard.write_bytes(b"nothing" * 20_000)
    with pytest.raises(UserError, match=r"nearly all of 23 records are unreadable, such as clip-21"):
        next(record_batches(open_source(folder), batch=1, seed=0))


def test_folders_that_are_none_are_clear_errors(prepared: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        open_source(tmp_path / "absent")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UserError, match=r"dataset\.json is missing; prepare the data first"):
        open_source(tmp_path / "foreign")
    unfinished = tmp_path / "unfinished"
    with ShardWriter(unfinished) as writer:
        writer.write(make_record(0))
    with pytest.raises(UserError, match="not finished; run it again"):
        open_source(unfinished)
    with pytest.raises(UserError, match="no training records"):
        open_source(write(tmp_path / "nothing", records=0))
    lost = tmp_path / "lost"
    shutil.copytree(prepared, lost, ignore=shutil.ignore_patterns("*.array_record"))
    with pytest.raises(UserError, match="none of its 3 shards"):
        open_source(lost)
    (lost / "dataset.json").write_text('{"format": 9}')
    with pytest.raises(UserError, match="damaged or of another kind"):
        open_source(lost)


def test_states_of_a_text_encoder_are_padded_and_must_fit(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        writer.write({**make_record(0), "text": np.ones((3, 6), np.float16)})
        writer.write({**make_record(1), "text": np.ones((5, 6), np.float16)})
        writer.finish(mean=np.zeros(CHANNELS), std=np.ones(CHANNELS), encoder={})
    source = open_source(tmp_path)
    assert len(source.buckets) == 1
    assert [source[i]["text"].sum() for i in range(2)] == [18, 30]
    with pytest.raises(UserError, match=r"text states \[3, 6\], the model takes 2 of 6"):
        ShardSource(tmp_path, text_len=2, text_dim=6)[0]

    assert "negative_text" not in source[0]
    with pytest.raises(UserError, match="has no negative prompt: run tools/prepare_data"):
        open_source(tmp_path, negative=True)
    write_negative(tmp_path, "blurred", np.full((2, 6), 0.5))
    batch = next(record_batches(open_source(tmp_path, negative=True), batch=2, seed=0))
    wanted = np.concatenate([np.full((2, 6), 0.5), np.zeros((3, 6))])
    np.testing.assert_array_equal(batch["negative_text"], np.stack([wanted, wanted]).astype(np.float32))


def test_workers_of_an_unguarded_script_are_a_clear_error(prepared: Path, monkeypatch: pytest.MonkeyPatch):
    import multiprocessing

    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="__main__"):
        record_batches(open_source(prepared), batch=1, seed=0, workers=1)
