"""Files are there whole or not at all, and what goes wrong is one line."""

import errno
import os
import re
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lavatar_jax.errors import UserError
from lavatar_jax.files import check_new, replacing, write_errors, write_text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left [os_error_code='28']"), "disk is full"),
        (
            SafetensorError("I/O error: Permission denied (os error 13)"),
            "not be written (Permission denied)",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written (Read-only file system)"),
    ],
)
def test_what_the_system_says_is_told_whoever_hands_it_on(error: Exception, told: str):
    with pytest.raises(UserError, match=re.escape(told)), write_errors(Path("out")):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(ValueError, match="a bug"), write_errors(Path("out")):
        raise ValueError("a bug")


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_device_stays_one(tmp_path: Path):
    path = tmp_path / "null"
    path.symlink_to(os.devnull)
    write_text(path, "text")
    assert path.is_symlink()
    assert os.listdir(tmp_path) == ["null"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone/a.txt: cannot be written \(No such file or directory\)"):
        write_text(tmp_path / "gone" / "a.txt", "text")


def test_what_stands_there_is_not_replaced(tmp_path: Path):
    check_new(tmp_path / "a")
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(UserError, match="a exists already; give another --out"):
        check_new(tmp_path / "a")
