"""Faces of a folder: each under an id of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiortc")

from lavatar_jax.errors import UserError
from lavatar_jax.serving.faces import load_faces
from tests.serving.conftest import picture


def test_a_folder_adds_to_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "Aunt_May.png").write_bytes(picture())
    assert list(load_faces(tmp_path)) == [*load_faces(), "aunt-may"]


def test_two_files_of_one_id_are_named(tmp_path: Path) -> None:
    for name in ("Aunt May.jpg", "aunt_may.png"):
        (tmp_path / name).write_bytes(picture("PNG" if name.endswith("png") else "JPEG"))
    with pytest.raises(UserError) as caught:
        load_faces(tmp_path)
    for told in (*map(str, tmp_path.iterdir()), "aunt-may", "rename"):
        assert told in str(caught.value)


def test_an_id_of_a_bundled_face_is_taken(tmp_path: Path) -> None:
    for taken in load_faces():
        file = tmp_path / f"{taken.upper()}.png"
        file.write_bytes(picture())
        with pytest.raises(UserError) as caught:
            load_faces(tmp_path)
        for told in (str(file), taken, "comes with lavatar_jax"):
            assert told in str(caught.value)
        file.unlink()
