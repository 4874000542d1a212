"""A conversion that is killed goes on where it was; what was damaged since is written anew."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lavatar_jax.checkpoints import orbax_store, stream_write
from lavatar_jax.checkpoints.conversion import JOURNAL, convert_folder
from lavatar_jax.errors import UserError
from tests.checkpoints.conversions import ROOT, chunks_of, command, contents, task_of
from tests.published import Published
from tools.inspect_checkpoint import main as inspect_main
from tools.pth import PickledTensors

SCRIPT = """
import os, signal, sys
from pathlib import Path
from lavatar_jax.checkpoints import conversion, journal, orbax_store, stream_write
from tools.pth import PickledTensors

point, count, wan, lora, out = sys.argv[1:]
orbax_store.CHUNK_BYTES, orbax_store.JOIN_BYTES, stream_write.SYNC_BYTES = 2**15, 1, 2**16
calls = 0

def killing(function):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

if point == "record":  # a chunk is written, but not in the journal
    journal.Journal.record = killing(journal.Journal.record)
elif point == "rename":  # all is done, but not under its name
    conversion.os.replace = killing(os.replace)
conversion.convert_folder(
    conversion.Task(wan=Path(wan), lora=Path(lora), out=Path(out), dtype="fp8"), PickledTensors
)
"""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of the small model have many chunks, as those of a large one."""
    monkeypatch.setattr(orbax_store, "CHUNK_BYTES", 2**15)
    monkeypatch.setattr(orbax_store, "JOIN_BYTES", 1)
    monkeypatch.setattr(stream_write, "SYNC_BYTES", 2**16)


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_conversion_goes_on_and_ends_the_same(source: Published, tmp_path: Path) -> None:
    task = task_of(source, tmp_path / "whole", lora=source.lora, dtype="fp8")
    convert_folder(task, PickledTensors)
    expected = contents(tmp_path / "whole")
    assert len(chunks_of(tmp_path / "whole/dit/blocks.ffn.inner.weight.values")) == 4
    out, partial = tmp_path / "killed", tmp_path / "killed.partial"
    kept: dict[Path, os.stat_result] = {}
    for point, count in (("record", 3), ("record", 160), ("rename", 1)):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, point, str(count), source.wan, source.lora, out],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL
        assert not out.exists()
        for path, before in kept.items():
            after = path.stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), path
        chunks = sorted(chunks_of(partial), key=lambda path: path.stat().st_mtime_ns)
        assert chunks
        kept = {path: path.stat() for path in chunks[:-2]}  # the last two may not be in the journal yet
    convert_folder(dataclasses.replace(task, out=out), PickledTensors)
    assert not partial.exists()
    assert contents(out) == expected


@pytest.mark.usefixtures("small_chunks")
def test_what_was_damaged_since_is_written_anew(source: Published, tmp_path: Path, monkeypatch) -> None:
    task = task_of(source, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr("lavatar_jax.checkpoints.conversion.os.replace", lambda *paths: _stop())
        with pytest.raises(KeyboardInterrupt):
            convert_folder(task, PickledTensors)
    partial = tmp_path / "model.partial"
    lines = (partial / JOURNAL).read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if b"dit/blocks.ffn.inner.weight" in line)
    (partial / JOURNAL).write_bytes(b"".join(lines[: first + 3]) + lines[first + 3][:9])  # torn by a crash
    chunk = partial / "dit/blocks.ffn.inner.weight/c/0/0/0"
    content = chunk.read_bytes()
    chunk.write_bytes(bytes(len(content) - 20) + content[-20:])
    convert_folder(task, PickledTensors)
    assert (tmp_path / "model/dit/blocks.ffn.inner.weight/c/0/0/0").read_bytes() == content
    assert command(inspect_main, tmp_path / "model", "--verify") == 0


def _stop() -> None:
    raise KeyboardInterrupt


def test_a_begun_conversion_must_not_change_its_mind(source: Published, tmp_path: Path, monkeypatch) -> None:
    task = task_of(source, tmp_path / "model")
    monkeypatch.setattr("lavatar_jax.checkpoints.conversion.os.replace", lambda *paths: _stop())
    with pytest.raises(KeyboardInterrupt):
        convert_folder(task, PickledTensors)
    with pytest.raises(UserError, match=r"model.partial was begun with another --dtype"):
        convert_folder(dataclasses.replace(task, dtype="fp8"), PickledTensors)
    with pytest.raises(UserError, match="begun with another --lora and set of source files"):
        convert_folder(dataclasses.replace(task, lora=source.lora), PickledTensors)
