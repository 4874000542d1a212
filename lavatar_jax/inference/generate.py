"""`serve.py generate`: a photo and a recording in, a talking video out."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tyro.conf import arg

from lavatar_jax.config import SAMPLING_PRESETS, SamplingConfig
from lavatar_jax.errors import UserError
from lavatar_jax.inference.contact_sheet import ContactSheet
from lavatar_jax.inference.images import DIVISOR, load_image, video_size
from lavatar_jax.inference.output import check_output, write_png
from lavatar_jax.inference.sound import SAMPLE_RATE, load_sound
from lavatar_jax.inference.video import VideoWriter, enlarged, read_frames

if TYPE_CHECKING:
    from lavatar_jax.parallel import PipelineLayout

SAMPLES = Path(__file__).parents[1] / "samples"
LONGEST_WHOLE = 120  # seconds; wav2vec2 attends over a whole recording, which costs the square of its length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Make a talking video from one photo and a recording."""

    image: Annotated[Path, arg(metavar="IMAGE")] = SAMPLES / "face.png"
    """Photo of the person: PNG, JPEG, WebP, ..."""
    audio: Annotated[Path, arg(metavar="AUDIO")] = SAMPLES / "voice.flac"
    """What they say: WAV, MP3, FLAC, OGG, M4A, ..."""
    prompt: Annotated[str, arg(metavar="TEXT")] = "a person talking"
    """How they look and behave."""
    pose: Annotated[Path | None, arg(metavar="VIDEO")] = None
    """Video of poses to follow, at any frame rate, for models trained with poses."""
    out: Annotated[Path, arg(metavar="MP4")] = Path("avatar.mp4")
    """Where to write the video."""
    seed: int = 0
    """Same seed, same video."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """Denoising steps a block (default: as the model was made for, 4 for tiny)."""
    preset: Literal["release-single", "release-tpp", "paper"] | None = None
    """How blocks are denoised, remembered and decoded (default: as the model was made for)."""
    size: Annotated[str | None, arg(metavar="WxH")] = None
    """Largest video, e.g. 704x384: its area counts, the proportions are the photo's."""
    streaming_audio: bool = False
    """Hear the recording piece by piece, as in a live session, not all at once (always over 2 minutes)."""
    model: Annotated[str, arg(metavar="NAME|DIR")] = "tiny"
    """The bundled small model, or a folder with a converted one."""
    devices: int = 1
    """Accelerators to use: each denoising step on its own, the decoder on one more (5 for 4 steps)."""
    sheet: Annotated[Path | None, arg(metavar="PNG")] = None
    """Also write a picture of 24 frames."""
    scale: Annotated[int | None, arg(metavar="N")] = None
    """Enlarge the video N times (default: small ones to at least 512 rows)."""

    def run(self) -> None:
        """Checks everything a user gave, then loads the model and makes the video. Raises UserError."""
        size = self._check_numbers()
        out, sheet_path = self._check_outputs()
        image = load_image(self.image)
        sound = load_sound(self.audio)
        if self.pose:
            next(read_frames(self.pose))

        # Imported only now: finding a mistake takes less time than importing jax.
        from lavatar_jax.checkpoints.store import load_config, load_model_folder, model_folder
        from lavatar_jax.inference.talk import photo_conditions, read_prompt, talk
        from lavatar_jax.models.speech_level import normalise_level

        folder = model_folder(self.model)
        config = load_config(folder)
        if self.pose and not config.dit.use_pose:
            raise UserError(
                f"--pose {self.pose}: the model {self.model} was trained without poses; leave it out"
            )
        if size and isinstance(config.image_size, int):
            raise UserError(
                f"--size {self.size}: the model {self.model} was trained for squares of "
                f"{config.image_size} pixels only; leave it out"
            )
        enlarged(*video_size(image, size or config.image_size), self.scale)
        sampling = SAMPLING_PRESETS[self.preset] if self.preset else config.sampling
        sampling = dataclasses.replace(sampling, steps=self.steps or sampling.steps)
        layout = self._layout(sampling)
        prompt = self.prompt if config.text is None else read_prompt(folder, config, self.prompt)
        avatar = load_model_folder(self.model)
        conditions = photo_conditions(avatar, image, prompt, sampling, image_size=size)
        pose = (frame[None] for frame in read_frames(self.pose, config.fps)) if self.pose else None
        samples, streaming = sound.samples, self.streaming_audio
        if config.speech is None:  # wav2vec2 normalises what it hears by itself
            samples = normalise_level(samples)
        elif sound.seconds > LONGEST_WHOLE and not streaming:
            print(
                f"note: {sound.seconds:.0f} s of sound are heard piece by piece (--streaming-audio)",
                file=sys.stderr,
            )
            streaming = True
        blocks = talk(
            avatar,
            conditions,
            samples,
            seed=self.seed,
            sampling=sampling,
            pose=pose,
            streaming=streaming,
            layout=layout,
        )
        fps = config.fps
        total = -(-len(sound.samples) * fps // SAMPLE_RATE)
        sheet = ContactSheet(total)
        writer = VideoWriter(out, scale=self.scale, fps=fps, audio=sound.track(), channels=sound.channels)
        try:
            with FrameProgress(total, fps) as progress, writer:
                for frames in first_frames(blocks, total):
                    writer.write(frames)
                    sheet.add(frames)
                    progress.advance(len(frames))
        except KeyboardInterrupt:
            if writer.frames:
                print(f"interrupted: the first {writer.frames / fps:.1f} s are in {out}", file=sys.stderr)
            raise
        print(f"{out}: {writer.frames / fps:.1f} s of video, {progress.summary()}")
        if sheet_path:
            write_png(sheet_path, sheet.image())
            print(f"{sheet_path}: contact sheet")

    def _check_numbers(self) -> tuple[int, int] | None:
        """Returns the size, (height, width)."""
        limits = {"seed": (0, 2**32 - 1), "steps": (1, 1000), "devices": (1, 1024), "scale": (1, 16)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value}: give a number from {low} to {high}")
        if self.size is None:
            return None
        sides = re.fullmatch(r"(\d{2,4})[x*](\d{2,4})", self.size)
        if not sides or not all(DIVISOR <= int(side) <= 4096 for side in sides.groups()):
            raise UserError(f"--size {self.size}: give two sides from {DIVISOR} to 4096, as in 704x384")
        return int(sides[2]), int(sides[1])

    def _layout(self, sampling: SamplingConfig) -> PipelineLayout | None:
        """How several devices share the work; None for one, which needs no pipeline."""
        if self.devices == 1:
            return None
        from lavatar_jax.parallel import claim_devices

        if (reason := sampling.why_no_pipeline) is not None:
            how = f"--preset {self.preset}" if self.preset else f"the model {self.model}"
            raise UserError(
                f"--devices {self.devices}: {how} runs on one device, as {reason}; "
                "leave --devices out, or give --preset release-tpp or paper"
            )
        return claim_devices(self.devices, sampling.steps)

    def _check_outputs(self) -> tuple[Path, Path | None]:
        out = check_output(self.out, ".mp4")
        sheet = check_output(self.sheet, ".png") if self.sheet else None
        for given in (self.image, self.audio, self.pose):
            for result in (out, sheet):
                if given and result and result.exists() and given.exists() and result.samefile(given):
                    raise UserError(f"{result} would overwrite a file it is made from; give another name")
        return out, sheet


def first_frames(blocks: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """Blocks of frames [T, H, W, 3] until there are `total` frames; the last block is cut."""
    for frames in blocks:
        yield frames[:total]
        total -= len(frames)
        if total <= 0:
            return


class FrameProgress:
    """A bar on stderr: frames, frames/s and how much faster than real time; only for people, not for logs.

    The first block is left out of the speed: it contains the compilation.
    """

    def __init__(self, total: int, fps: int) -> None:
        self._fps = fps
        self._frames = self._first = 0
        self._started = self._after_first = time.perf_counter()
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("starting", total=total, speed="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self._frames += count
        if not self._first:
            self._first, self._after_first = count, time.perf_counter()
        self._progress.update(self._task, advance=count, description="frames", speed=self._speed())

    def _speed(self) -> str:
        if self._frames == self._first:
            return ""
        speed = (self._frames - self._first) / (time.perf_counter() - self._after_first)
        return f"{speed:.0f} frames/s, {speed / self._fps:.1f}x real time"

    def summary(self) -> str:
        """How long all took, and the speed once running."""
        seconds = f"made in {time.perf_counter() - self._started:.1f} s"
        speed = self._speed()
        return f"{seconds} ({speed} after the first block)" if speed else seconds
