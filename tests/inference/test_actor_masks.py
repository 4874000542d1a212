"""Masks of several speakers against the reference's, and the rules that they follow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavatar_jax.errors import UserError
from lavatar_jax.inference import actor_masks
from tests.shared import golden


def test_golden_masks() -> None:
    case, inputs, outputs = golden("06e_actor_mask_building")
    frames, (height, width) = case["infer_frames"] // 4, case["gen_hw"]
    tokens = (frames, height // 16, width // 16)
    routing = actor_masks.route(inputs["png_masks"], tokens)
    expected = outputs["routing_logits"].reshape(*tokens, -1).transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(routing, expected)
    np.testing.assert_array_equal(actor_masks.dilate(routing)[..., None], outputs["dilated"])
    mask = actor_masks.build_actor_masks(inputs["png_masks"], tokens)
    np.testing.assert_array_equal(mask[..., None], outputs["mask"])


def test_later_actors_overwrite_earlier_ones() -> None:
    masks = np.ones((3, 1, 8, 8), np.uint8)
    masks[2, :, :, :4] = 0
    routing = actor_masks.route(masks, (1, 4, 4))
    assert routing.sum(axis=0).max() == 1
    assert routing[1, 0, :, :2].all()
    assert routing[2, 0, :, 2:].all()


def test_dilation_grows_with_the_box() -> None:
    region = np.zeros((2, 1, 60, 60), bool)
    region[0, 0, 20:41, 25:30] = True  # 21 high: reaches ceil(2.1) = 3
    region[1, 0, 30, 30] = True  # at least one token
    grown = actor_masks.dilate(region)
    assert np.argwhere(grown[0, 0]).min(0).tolist() == [17, 22]
    assert np.argwhere(grown[0, 0]).max(0).tolist() == [43, 32]
    assert grown[1].sum() == 9


def test_background_hears_all_and_overlap_nobody() -> None:
    masks = np.zeros((2, 1, 20, 40), np.uint8)
    masks[0, :, 5:15, 5:20] = 255
    masks[1, :, 5:15, 20:35] = 255
    weights = actor_masks.build_actor_masks(masks, (3, 20, 40))
    assert weights.shape == (2, 3, 20, 40)
    assert weights[:, 0, 0, 0].tolist() == [1, 1]
    assert weights[:, 0, 10, 20].tolist() == [0, 0]
    assert weights[:, 0, 10, 10].tolist() == [1, 0]


def test_masks_are_read_from_images(tmp_path: Path) -> None:
    for name, size in (("a", (20, 10)), ("b", (20, 10)), ("c", (21, 10))):
        Image.new("1", size, name == "a").save(tmp_path / f"{name}.png")
    masks = actor_masks.load_actor_masks([tmp_path / "a.png", tmp_path / "b.png"])
    assert masks.shape == (2, 1, 10, 20)
    assert masks[0].all()
    assert not masks[1].any()
    with pytest.raises(UserError, match="one size"):
        actor_masks.load_actor_masks([tmp_path / "a.png", tmp_path / "c.png"])
