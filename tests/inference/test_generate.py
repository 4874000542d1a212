"""`serve.py generate` from its command line, with a stand-in for the model: what a user sees and finds.

The stand-in paints frames that count, so cuts and repetitions would show. Every mistake must cost one line
on stderr, exit code 2, and leave no file behind; and none may be found only after the model was loaded.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import serve
from lavatar_jax.checkpoints import store
from lavatar_jax.cli import run
from lavatar_jax.config import PAPER, RELEASE_SINGLE, SamplingConfig
from lavatar_jax.inference import generate, video
from lavatar_jax.inference import talk as talking
from lavatar_jax.inference.images import load_image
from lavatar_jax.inference.sound import SAMPLE_RATE, load_sound
from lavatar_jax.inference.video import read_video
from lavatar_jax.parallel import PipelineLayout

SIZE = 32


class StandIn:
    """Takes the place of the model folder, `photo_conditions` and `talk`; remembers what it was asked."""

    config = SimpleNamespace(
        fps=25,
        image_size=SIZE,
        dit=SimpleNamespace(use_pose=False),
        sampling=SamplingConfig(steps=4),
        speech=None,
        text=None,
    )

    def __init__(self, first_block: int = 12) -> None:
        self.loaded: list[str] = []
        self.asked: dict[str, Any] = {}
        self.first_block = first_block
        self.before_block: Callable[[int], None] = lambda index: None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "model_folder", lambda name: Path("."))
        monkeypatch.setattr(store, "load_config", lambda folder: self.config)
        monkeypatch.setattr(store, "load_model_folder", self.load_model_folder)
        monkeypatch.setattr(talking, "photo_conditions", self.photo_conditions)
        monkeypatch.setattr(talking, "talk", self.talk)

    def load_model_folder(self, name: str) -> SimpleNamespace:
        self.loaded.append(name)
        return SimpleNamespace(config=self.config)

    def photo_conditions(
        self,
        avatar: SimpleNamespace,
        image: np.ndarray,
        prompt: str,
        sampling: SamplingConfig,
        *,
        image_size: tuple[int, int] | None,
    ) -> str:
        self.asked |= {"image": image, "prompt": prompt, "image_size": image_size}
        return "conditions"

    def talk(
        self,
        avatar: SimpleNamespace,
        conditions: str,
        sound: np.ndarray,
        *,
        seed: int,
        sampling: SamplingConfig,
        pose: Iterator[np.ndarray] | None,
        streaming: bool,
        layout: PipelineLayout | None,
    ) -> Iterator[np.ndarray]:
        self.asked |= {"sound": sound, "seed": seed, "steps": sampling.steps, "pose": pose and list(pose)}
        self.asked |= {"sampling": sampling, "streaming": streaming, "layout": layout}
        start = 0
        for index in range(10_000):  # never ends by itself: the caller cuts
            self.before_block(index)
            count = self.first_block if index == 0 else 12
            values = (np.arange(start, start + count) * 5 % 250).astype(np.uint8)
            yield np.broadcast_to(values[:, None, None, None], (count, SIZE, SIZE, 3))
            start += count


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    model = StandIn()
    model.install(monkeypatch)
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a good face.png and a good voice.wav of 1.1 s (27.5 frames)."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "orange").save("face.png")
    soundfile.write("voice.wav", 0.3 * np.sin(np.arange(17_600) / 20), SAMPLE_RATE)
    return tmp_path


GOOD = ["generate", "--image", "face.png", "--audio", "voice.wav", "--out", "out.mp4", "--scale", "1"]


def test_frames_sound_and_options_arrive(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.first_block = 9  # released checkpoints drop the first three frames
    options = ["--prompt", "a friendly person", "--seed", "7", "--steps", "3", "--sheet", "sheet.png"]
    assert run(lambda: serve.main([*GOOD, *options])) == 0
    made = read_video("out.mp4")
    assert len(made.frames) == 28
    np.testing.assert_allclose(made.frames.mean((1, 2, 3)), np.arange(28) * 5 % 250, atol=3)
    assert made.sound is not None
    assert abs(made.sound.seconds - 28 / 25) < 1 / 25
    assert load_image("sheet.png").shape == (4 * SIZE, 6 * SIZE, 3)
    assert stand_in.asked["prompt"] == "a friendly person"
    assert (stand_in.asked["seed"], stand_in.asked["steps"]) == (7, 3)
    assert stand_in.asked["layout"] is None
    assert np.shape(stand_in.asked["image"]) == (40, 40, 3)
    assert np.shape(stand_in.asked["sound"]) == (17_600,)
    assert sorted(os.listdir()) == ["face.png", "out.mp4", "sheet.png", "voice.wav"]
    out, err = capsys.readouterr()
    assert "out.mp4: 1.1 s of video" in out
    assert "sheet.png" in out
    assert err == ""


def test_presets_and_sizes_arrive(folder: Path, stand_in: StandIn) -> None:
    stand_in.config = SimpleNamespace(**vars(stand_in.config) | {"image_size": (704, 384)})
    assert run(lambda: serve.main([*GOOD, "--preset", "paper", "--size", "320x192"])) == 0
    assert stand_in.asked["sampling"] == PAPER
    assert stand_in.asked["image_size"] == (192, 320)
    assert run(lambda: serve.main([*GOOD, "--preset", "release-single", "--steps", "2"])) == 0
    assert stand_in.asked["sampling"] == dataclasses.replace(RELEASE_SINGLE, steps=2)
    assert stand_in.asked["image_size"] is None


def test_what_one_device_only_can_sample_is_not_spread(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: serve.main([*GOOD, "--preset", "release-single", "--devices", "2"])) == 2
    err = capsys.readouterr().err
    assert "--devices 2: --preset release-single runs on one device, as it decodes whole clips" in err
    assert not stand_in.loaded


def test_a_scale_that_makes_the_video_too_large_is_told_before_the_model_is_loaded(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.config = SimpleNamespace(**vars(stand_in.config) | {"image_size": 1024})
    assert run(lambda: serve.main([*GOOD, "--scale", "9"])) == 2
    assert "a video of 9216x9216 is too large; use a smaller --scale" in capsys.readouterr().err
    assert not stand_in.loaded


def test_long_recordings_are_heard_as_a_stream(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """wav2vec2 over a whole hour would need more memory than there is; and its input is not made louder."""
    stand_in.config = SimpleNamespace(**vars(stand_in.config) | {"speech": object()})
    samples = load_sound("voice.wav").samples
    assert run(lambda: serve.main(GOOD)) == 0
    assert not stand_in.asked["streaming"]
    np.testing.assert_array_equal(stand_in.asked["sound"], samples)
    assert run(lambda: serve.main([*GOOD, "--streaming-audio"])) == 0
    assert stand_in.asked["streaming"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(generate, "LONGEST_WHOLE", 1)
    assert run(lambda: serve.main(GOOD)) == 0
    assert stand_in.asked["streaming"]
    assert capsys.readouterr().err.startswith("note: 1 s of sound are heard piece by piece")


def test_without_arguments_the_bundled_sample_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(lambda: serve.main(["generate"])) == 0
    assert "avatar.mp4" in capsys.readouterr().out
    made = read_video("avatar.mp4")
    assert made.frames.shape[1:3] == (512, 512)  # enlarged
    assert made.sound is not None
    assert made.sound.samples.std() > 0.01


@pytest.mark.parametrize("count", [1, 639, 640, 641, 12 * 640, 12 * 640 + 1])
def test_length_is_that_of_the_sound(folder: Path, stand_in: StandIn, count: int) -> None:
    soundfile.write("voice.wav", np.zeros(count), SAMPLE_RATE)  # silence is not an error
    assert run(lambda: serve.main(GOOD)) == 0
    assert len(read_video("out.mp4").frames) == -(-count // 640)


def cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def bad_text_png(path: str) -> None:
    Path(path).write_text("not a picture\n" * 20)


def bad_jpeg(path: str) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(path)
    cut(path)


def bad_bomb(path: str) -> None:
    Image.new("1", (12_000, 12_000)).save(path)


def bad_nan(path: str) -> None:
    soundfile.write(path, np.full(2000, np.nan), SAMPLE_RATE, subtype="FLOAT")


def bad_zero_length(path: str) -> None:
    soundfile.write(path, np.zeros(0), SAMPLE_RATE)


def make_folder(path: str) -> None:
    Path(path).mkdir()


def nothing(path: str) -> None:
    pass


def empty(path: str) -> None:
    Path(path).touch()


MISTAKES = {
    "missing image": ("--image", "x.png", nothing, "no such image file"),
    "empty image": ("--image", "x.png", empty, "empty"),
    "text named png": ("--image", "x.png", bad_text_png, "not an image"),
    "truncated jpeg": ("--image", "x.jpg", bad_jpeg, "damaged"),
    "decompression bomb": ("--image", "x.png", bad_bomb, "million pixels"),
    "folder as image": ("--image", "x", make_folder, "folder"),
    "missing audio": ("--audio", "x.wav", nothing, "no such audio file"),
    "empty audio": ("--audio", "x.wav", empty, "empty"),
    "text named wav": ("--audio", "x.wav", bad_text_png, "no audio file"),
    "zero-length audio": ("--audio", "x.wav", bad_zero_length, "length is zero"),
    "NaN samples": ("--audio", "x.wav", bad_nan, "not numbers"),
    "picture as audio": ("--audio", "face.png", nothing, "no audio"),
    "folder as output": ("--out", "x", make_folder, "folder"),
    "no such folder": ("--out", "no/x.mp4", nothing, "no folder"),
    "not an mp4": ("--out", "x.gif", nothing, ".mp4"),
    "sheet in no folder": ("--sheet", "no/x.png", nothing, "no folder"),
    "sheet not a png": ("--sheet", "x.jpg", nothing, ".png"),
    "missing pose": ("--pose", "x.mp4", nothing, "no such video file"),
    "pose is no video": ("--pose", "voice.wav", nothing, "no pictures"),
    "unknown option": ("--colour", "red", nothing, "--colour"),
    "misspelt option": ("--stepz", "3", nothing, "--steps"),
    "steps not a number": ("--steps", "many", nothing, "--steps"),
    "steps zero": ("--steps", "0", nothing, "--steps 0"),
    "steps negative": ("--steps", "-4", nothing, "--steps -4"),
    "steps a fraction": ("--steps", "2.5", nothing, "--steps"),
    "seed negative": ("--seed", "-1", nothing, "--seed -1"),
    "seed too large": ("--seed", str(2**32), nothing, "--seed"),
    "devices zero": ("--devices", "0", nothing, "--devices 0"),
    "devices too many": ("--devices", "99", nothing, "--devices 99"),
    "devices that do not divide the steps": ("--devices", "7", nothing, "devices that work: 1, 2, 3, 4, 5"),
    "size not two sides": ("--size", "704", nothing, "as in 704x384"),
    "size too small": ("--size", "704x63", nothing, "from 64"),
    "size of a fixed model": ("--size", "704x384", nothing, "leave it out"),
    "unknown preset": ("--preset", "best", nothing, "release-tpp"),
    "scale zero": ("--scale", "0", nothing, "--scale 0"),
    "scale huge": ("--scale", "100", nothing, "--scale 100"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_cost_one_line(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    option, value, prepare, complaint = MISTAKES[mistake]
    prepare(value)
    before = sorted(folder.rglob("*"))
    assert run(lambda: serve.main([*GOOD, option, value])) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert sorted(folder.rglob("*")) == before
    assert not stand_in.loaded, "found only after the model was loaded"


@pytest.mark.parametrize("args", [[], ["walk"], ["generate", "now"], ["generate", "--steps"]])
def test_wrong_command_lines_cost_one_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: serve.main(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "--help" in err


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        serve.main(args)
    assert stop.value.code == 0
    assert "generate" in capsys.readouterr().out


@pytest.fixture
def pose() -> str:
    with video.VideoWriter("pose.mp4", scale=1) as writer:
        writer.write(np.zeros((3, 16, 16, 3), np.uint8))
    return "pose.mp4"


def test_poses_need_a_model_with_poses(
    folder: Path, stand_in: StandIn, pose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: serve.main([*GOOD, "--pose", pose])) == 2
    assert "trained without poses" in capsys.readouterr().err
    assert not stand_in.loaded
    assert not Path("out.mp4").exists()


def test_poses_arrive_in_pieces(folder: Path, stand_in: StandIn, pose: str) -> None:
    stand_in.config = SimpleNamespace(**vars(stand_in.config) | {"dit": SimpleNamespace(use_pose=True)})
    assert run(lambda: serve.main([*GOOD, "--pose", pose])) == 0
    assert np.concatenate(stand_in.asked["pose"]).shape == (3, 16, 16, 3)


@pytest.mark.parametrize("files", [None, [], ["config.json"], ["config.json", "dit.safetensors"]])
def test_an_incomplete_model_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], files: list[str] | None
) -> None:
    if files is not None:
        Path("model").mkdir()
        for name in files:
            Path("model", name).touch()
    assert run(lambda: serve.main([*GOOD, "--model", "model"])) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: model")
    assert err.count("\n") == 1
    assert not Path("out.mp4").exists()


def test_results_never_overwrite_what_they_are_made_from(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("speech.mp4").write_bytes(Path("voice.wav").read_bytes())
    before = Path("speech.mp4").read_bytes()
    assert run(lambda: serve.main([*GOOD, "--audio", "speech.mp4", "--out", "./speech.mp4"])) == 2
    assert run(lambda: serve.main([*GOOD, "--sheet", "face.png"])) == 2
    assert capsys.readouterr().err.count("would overwrite") == 2
    assert Path("speech.mp4").read_bytes() == before


def test_a_disk_that_fills_up(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video.os, "replace", no_space)
    assert run(lambda: serve.main(GOOD)) == 2
    assert capsys.readouterr().err == "error: out.mp4: the disk is full; free some space or write elsewhere\n"
    assert sorted(os.listdir()) == ["face.png", "voice.wav"]


def test_ctrl_c_keeps_what_was_made(
    folder: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    stand_in.before_block = interrupt
    soundfile.write("voice.wav", np.zeros(10 * SAMPLE_RATE), SAMPLE_RATE)
    assert run(lambda: serve.main([*GOOD, "--sheet", "sheet.png"])) == 130
    assert len(read_video("out.mp4").frames) == 24
    assert capsys.readouterr().err == "interrupted: the first 1.0 s are in out.mp4\n"


def test_an_error_of_ours_is_not_hidden(folder: Path, stand_in: StandIn) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("a bug")

    stand_in.before_block = fail
    with pytest.raises(RuntimeError, match="a bug"):
        run(lambda: serve.main(GOOD))
    assert sorted(os.listdir()) == ["face.png", "voice.wav"]


def test_speed_leaves_the_first_block_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 30.0, 31.0, 31.0, 31.0, 31.0])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(times))
    progress = generate.FrameProgress(36, 25)
    progress.advance(12)  # 30 s of compilation
    progress.advance(50)
    assert progress.summary() == "made in 31.0 s (50 frames/s, 2.0x real time after the first block)"


def test_ctrl_c_in_a_real_process_leaves_a_playable_file(folder: Path) -> None:
    """The whole program in a process of its own, stopped while its endless stand-in paints."""
    root = Path(serve.__file__).parent
    program = f"""
import sys, time
sys.path[:0] = [{str(root)!r}]
import pytest
from tests.inference.test_generate import StandIn, run, serve
model = StandIn()
def slowly(index):
    print("block", index, flush=True)
    time.sleep(0.05)
model.before_block = slowly
model.install(pytest.MonkeyPatch())
sys.exit(run(lambda: serve.main({GOOD!r})))
"""
    soundfile.write("voice.wav", np.zeros(100 * SAMPLE_RATE), SAMPLE_RATE)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("block 3"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    assert len(read_video("out.mp4").frames) >= 36
    assert sorted(os.listdir()) == ["face.png", "out.mp4", "voice.wav"]
