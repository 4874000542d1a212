"""The report shows records that training never saw, as the model says them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from lavatar_jax.config import SamplingConfig, VAEConfig
from lavatar_jax.data.loader import ShardSource, record_batches
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.errors import UserError
from lavatar_jax.training import samples
from lavatar_jax.training.latents import load_vae
from lavatar_jax.training.samples import make_evaluator, make_sampler, stream_record
from tests.tiny import random_dit, tiny_config
from tests.training.painted import PaintedVAE

MODEL = tiny_config(use_motion=False, use_pose=False)
SAMPLING = SamplingConfig(motion=False, steps=2)
CLIPS, FRAMES, SIDE = 5, 2 * MODEL.block_frames, 4
LAST = f"{'a folder/' * 30}clip.mp4-000005"  # as records of real videos are called


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float16)

    with ShardWriter(tmp_path / "shards") as writer:
        for index in range(CLIPS):
            writer.write(
                {
                    "id": LAST if index == CLIPS - 1 else f"clip{index}",
                    "caption": "a person talking",
                    "latent": draw(FRAMES, SIDE, SIDE, MODEL.latent_channels),
                    "reference": draw(1, SIDE, SIDE, MODEL.latent_channels),
                    "audio": draw(MODEL.audio_layers, MODEL.audio_dim, 4 * FRAMES),
                }
            )
        channels = MODEL.latent_channels
        writer.finish(mean=np.full(channels, 2.0), std=np.full(channels, 3.0), encoder={})
    return tmp_path / "shards"


def open_source(folder: Path, held_out: int) -> ShardSource:
    return ShardSource(folder, text_len=MODEL.text_len, text_dim=MODEL.text_dim, held_out=held_out)


def test_held_out_records_are_in_no_batch_and_can_be_read(folder: Path) -> None:
    source = open_source(folder, 2)
    batches = record_batches(source, batch=3, seed=0)
    seen = {int(number) for _ in range(8) for number in next(batches)["record"]}
    assert seen == {0, 1, 2}
    assert [source.ids[number] for number in source.held_out] == ["clip3", LAST]
    assert source[4]["latent"].shape == (FRAMES, SIDE, SIDE, MODEL.latent_channels)
    with pytest.raises(UserError, match="5 cannot be held out"):
        open_source(folder, CLIPS)


def test_a_sample_is_the_truth_beside_what_the_model_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "load_vae", lambda place: (VAEConfig(), PaintedVAE()))
    source, model = open_source(folder, 1), random_dit(MODEL)
    asked: list[Any] = []

    def model_of(state: Any) -> Any:
        asked.append(state)
        return model

    sample = make_sampler(source, SAMPLING, "vae", model_of)
    assert sample is not None
    sample("the state", tmp_path)
    assert asked == ["the state"]
    (shown_record,) = tmp_path.glob("*.*")
    assert shown_record.match("*_a folder_clip.mp4-000005-*.webp")
    with Image.open(shown_record) as picture:
        assert picture.n_frames == FRAMES  # the four of a latent are equal here, and kept as one
        assert picture.size == (2 * 2 * 32, 2 * 32)
        picture.seek(FRAMES - 1)
        shown = np.asarray(picture.convert("RGB"), np.float32)[1::2, 1::2]
    row = source[4]
    made = np.asarray(stream_record(model, row, SAMPLING))
    for half, latent in ((shown[:, :32], row["latent"]), (shown[:, 32:], made)):
        colours = (latent[-1, ..., :3] * 3.0 + 2.0) / 10.0  # as the records were written
        wanted = np.clip(colours.repeat(8, axis=0).repeat(8, axis=1) * 127.5 + 128.0, 0, 255)
        assert np.abs(half[4::8, 4::8] - wanted[4::8, 4::8]).mean() < 8  # WebP is not exact


def test_another_vae_than_the_records_is_refused(folder: Path) -> None:
    tiny = dataclasses.asdict(load_vae("tiny")[0])
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | {"encoder": {"vae": tiny}}))
    assert make_sampler(open_source(folder, 1), SAMPLING, "tiny", lambda state: state) is not None
    tiny["latent_channels"] = 48
    (folder / "dataset.json").write_text(json.dumps(about | {"encoder": {"vae": tiny}}))
    with pytest.raises(UserError, match=r"another VAE than tiny \(latent_channels 48, not 16\)"):
        make_sampler(open_source(folder, 1), SAMPLING, "tiny", lambda state: state)


def test_the_loss_on_held_out_records_is_the_same_each_time(folder: Path) -> None:
    rows: list[int] = []

    def loss_fn(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        noise = jax.random.normal(key, batch["latent"].shape)
        error = jax.numpy.mean(jax.numpy.square(params["scale"] * batch["latent"] - noise))
        jax.debug.callback(lambda record: rows.append(int(record[0])), batch["record"])
        return error, {"flow": error}

    def state(scale: float) -> SimpleNamespace:
        return SimpleNamespace(average={"scale": scale})

    evaluate = make_evaluator(open_source(folder, 2), loss_fn, {})
    assert evaluate is not None
    first, worse, again = evaluate(state(0.5)), evaluate(state(2.0)), evaluate(state(0.5))
    assert first.keys() == {"held_out_flow"}
    assert first == again
    assert worse["held_out_flow"] > first["held_out_flow"]
    assert set(rows) == {3, 4}


def test_without_held_out_records_there_is_nothing_to_show(folder: Path) -> None:
    source = open_source(folder, 0)
    assert make_sampler(source, SAMPLING, "no VAE is opened", lambda state: state) is None
    assert make_evaluator(source, lambda *_: None, {}) is None
    held = open_source(folder, 1)
    assert make_sampler(held, SAMPLING, "no VAE is opened", lambda state: state, every=0.0) is None
    assert make_evaluator(held, lambda *_: None, {}) is not None, "it is measured all the same"
