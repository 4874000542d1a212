"""What a run writes about itself."""

import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from lavatar_jax.data.skipped import SKIPPED, SkippedLog
from lavatar_jax.evaluation.devices import find_gpu
from lavatar_jax.parallel import put_batch
from lavatar_jax.training.logs import LOG, LogConfig, read_log
from lavatar_jax.training.loop import LoopConfig, fit
from lavatar_jax.training.optim import schedule
from lavatar_jax.training.samples import save_moving_pictures
from tests.training.toy_run import BATCH, Batches, begin, mesh_of, train


def test_a_run_leaves_curves_samples_tensorboard_and_a_profile(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    step_fn, state, frozen = begin(mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    (tmp_path / "config.json").write_text('{"<model>": 1}')

    def sample(state: Any, folder: Path) -> None:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "face <1>.png")

    config = LoopConfig(steps=6, batch=BATCH, log_every=2, warmup=0.0)
    log = LogConfig(profile_steps=(2, 3))
    evaluate = {"psnr": 31.5, "nothing": float("nan")}
    fit(
        step_fn, state, frozen, Batches(), config, tmp_path, log=log, evaluate=lambda state: evaluate,
        sample=sample,
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count("<polyline") >= 4, "loss, gradient norm, rate, evaluation"
    assert "psnr: 31.5" in page
    assert "data:image/png;base64," in page
    assert "Samples of step 6" in page
    assert "&lt;model&gt;" in page
    assert "face &lt;1&gt;" in page
    assert 'src="http' not in page
    assert "href" not in page
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    (program,) = (line["program"] for line in read_log(tmp_path / LOG) if "program" in line)
    assert program["arguments_gb"] > 2e-9 * size, "parameters, and their average"
    assert program["temporary_gb"] > 0
    assert program["devices"] == 1
    assert f"temporary_gb {program['temporary_gb']:.4g}" in page


def test_a_signal_asks_for_a_profile_of_the_next_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step_fn, state, frozen = begin(mesh_of(1, 1, 1))
    profiled: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: profiled.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: profiled.append("end"))

    class Asking(Batches):
        def __next__(self) -> Any:
            if self.taken == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            profiled.append(f"batch {self.taken}")
            return super().__next__()

    before = signal.getsignal(signal.SIGUSR1)
    fit(step_fn, state, frozen, Asking(), LoopConfig(steps=9, batch=BATCH), tmp_path)
    batches = [f"batch {number}" for number in range(9)]
    assert profiled == [*batches[:3], str(tmp_path / "profile"), *batches[3:8], "end", batches[8]]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("report", [True, False])
def test_a_finished_run_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], report: bool):
    step_fn, state, frozen = begin(mesh_of(1, 1, 1))
    log = LogConfig(report=report)
    fit(step_fn, state, frozen, Batches(), LoopConfig(steps=2, batch=BATCH), tmp_path, log=log)
    curves = f"; curves and samples: {tmp_path / 'report.html'}" if report else ""
    assert f"trained to step 2, which is saved in {tmp_path}{curves}\n" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file() == report


def test_records_that_cannot_be_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    step_fn, state, frozen = begin(mesh_of(1, 1, 1))

    class Damaged(Batches):
        def __next__(self) -> Any:
            SkippedLog(tmp_path / SKIPPED).add("<clip>", "lost")  # as a data worker, again after each start
            return super().__next__()

    fit(step_fn, state, frozen, Damaged(), LoopConfig(steps=2, batch=BATCH, log_every=1), tmp_path)
    assert [line["skipped_records"] for line in read_log(tmp_path / LOG) if "step" in line] == [1, 1]
    page = (tmp_path / "report.html").read_text()
    assert "Records that could not be read (1)" in page
    assert "&lt;clip&gt;: lost" in page
    told = capsys.readouterr().out.replace("\n", "")
    assert f"training records that could not be read: 1; {tmp_path / SKIPPED}" in told


def test_samples_are_taken_at_intervals_and_at_the_end(tmp_path: Path):
    step_fn, state, frozen = begin(mesh_of(1, 1, 1))
    config = LoopConfig(steps=5, batch=BATCH, checkpoint_seconds=0.0)
    taken: list[str] = []

    def sample(state: Any, folder: Path) -> None:
        taken.append(folder.name)

    fit(step_fn, state, frozen, Batches(), config, tmp_path, sample=sample, sample_every=1e6)
    assert taken == ["00000001", "00000005"]


def test_samples_and_reports_that_cannot_be_written_do_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    step_fn, state, frozen = begin(mesh_of(1, 1, 1))
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith((".webp", ".html")):
            raise OSError(28, "No space left on device")
        replace(source, target)

    def sample(state: Any, folder: Path) -> None:
        save_moving_pictures([("a", np.zeros((2, 8, 8, 3), np.float32))], folder)

    monkeypatch.setattr(os, "replace", full)
    config = LoopConfig(steps=3, batch=BATCH)
    last = fit(step_fn, state, frozen, Batches(), config, tmp_path, sample=sample)
    assert int(last.step) == 3
    said = capsys.readouterr().out.replace("\n", "")
    assert f"no samples at step 3: {tmp_path}/samples/00000003/a.webp: the disk is full" in said
    assert f"{tmp_path}/report.html: the disk is full" in said


def test_transfers_that_nobody_asked_for_are_refused(tmp_path: Path):
    mesh = mesh_of(1, 1, 1)
    step_fn, state, frozen = begin(mesh)

    def careless(state: Any, frozen: Any, batch: Any, rate: Any) -> Any:
        return step_fn(state, frozen, batch, rate)

    class Careless(Batches):
        def __next__(self) -> Any:
            jax.numpy.asarray(np.ones(3)) + 1
            return super().__next__()

    config = LoopConfig(steps=2, batch=BATCH)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit(careless, state, frozen, Careless(), config, tmp_path)


def test_a_run_says_what_it_computes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path, 1, mesh_of(2, 1, 1))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "training on 2 of 9 devices, cpu (data 2 x fsdp 1 x tensor 1); 9 in this process, processes: 1"
        in said
    )


def test_a_batch_is_put_as_it_is():
    batch = put_batch({"x": np.arange(8.0).reshape(4, 2)}, mesh_of(2, 2, 1))
    np.testing.assert_array_equal(batch["x"], np.arange(8.0).reshape(4, 2))
    assert len({shard.index[0].start for shard in batch["x"].addressable_shards}) == 4


def test_devices_are_known_by_their_full_names():
    assert find_gpu("NVIDIA H100 80GB HBM3").name == "h100"
    assert find_gpu("NVIDIA H200").name == "h200"
    assert find_gpu("cpu") is None


@pytest.mark.parametrize(
    ("kind", "half", "end"), [("linear", 1.0, 0.0), ("cosine", 0.5, 0.0), ("constant", 1, 1)]
)
def test_schedules(kind: Any, half: float, end: float):
    assert schedule(0.5, warmup=0.0, kind=kind) == pytest.approx(half)
    assert schedule(1.0, warmup=0.0, kind=kind) == pytest.approx(end)
    assert schedule(0.05, warmup=0.1, kind=kind) == pytest.approx(0.5, abs=0.01)
