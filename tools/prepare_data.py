"""Make training records of videos: `python tools/prepare_data.py FOLDER_OF_VIDEOS --out SHARDS`.

Any container, size and rate, also inside of WebDataset tars; NAME.txt beside NAME.mp4 is its caption,
NAME.pose.mp4 a video of its driving poses. Shots with exactly one face and audible speech become clips of 25
frames a second; `report.html` in the output says what was dropped and why. The same command goes on after an
interruption, adds new videos, looks again at those that gave nothing and have changed since, and takes
captions and poses that came later. Changed ones, other filters, faces, lengths, pixels and light need another
--out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from rich.progress import Progress
from tyro.conf import arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import configure_jax, parse_options, run
from lavatar_jax.data.clip_filters import FPS, FilterConfig
from lavatar_jax.data.face_boxes import load_detector
from lavatar_jax.data.made_with import first_difference, write_note
from lavatar_jax.data.negative_prompt import NEGATIVE, read_negative, write_negative
from lavatar_jax.data.shards import PREPARED, RENDERED, ShardWriter
from lavatar_jax.errors import UserError
from tools.real_clips import CRASHED, Interrupted, Job, Outcome, cut_video, start_worker
from tools.real_journal import JOURNAL, REPORT, Book
from tools.real_sources import VIDEOS, find_sources

if TYPE_CHECKING:
    from tools.real_encode import ClipEncoder

WORK = ".work"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Make training records of a folder of videos."""

    folder: tyro.conf.Positional[Path]
    """Videos, or WebDataset tars of videos; subfolders count."""
    out: Annotated[Path, arg(metavar="SHARDS")]
    """Folder for the records, and for report.html."""
    model: Annotated[str, arg(metavar="NAME|DIR")] = "tiny"
    """Whose VAE, speech and text encoders make the records: the bundled model, or a converted one."""
    faces: str = "haar"
    """What finds faces: haar (OpenCV), any (every picture counts as one face), or your module:function."""
    blocks: int = 4
    """Length of a clip in blocks of 12 frames."""
    negative_prompt: str | None = None
    """What guidance may lead away from in stage 2, for models with a text encoder; None: the one that is
    there, else the empty prompt."""
    motion_frames: int = 9
    """Frames before a clip that are kept as its past; 1 + 4k."""
    other_light: float = 0.0
    """Share of references in another light than their clip, so that colours are not simply copied."""
    pixels: int = 0
    """Frames of each clip, 1 + 4k, that are kept as pictures, for stage 0; records grow much by them."""
    part: str = "1/1"
    """K/N: only the K-th of N shares of the videos; tools/join_data.py joins what N machines made."""
    work: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where pieces lie as plain pixels while they wait for the encoder, such as a disk of this machine; None:
    in SHARDS."""
    workers: int = max(1, min(8, (os.cpu_count() or 1) - 1))
    """Processes that decode and filter; 0: none but this one."""
    shard_records: int = 256
    """Records in a file."""
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)


def main(args: list[str]) -> None:
    options = parse_options(Prepare, args, prog="tools/prepare_data.py")
    if options.motion_frames < 1 or options.motion_frames % 4 != 1 or options.blocks < 1:
        raise UserError("--motion-frames must be 1 + 4k (1, 5, 9, ...) and --blocks at least 1")
    if not 0 <= options.other_light <= 1:
        raise UserError(f"--other-light is a share from 0 to 1, not {options.other_light:g}")
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no such folder; give the folder of the videos")
    mine = share(options.part)
    sources, useless = find_sources(options.folder)
    if not sources and not useless:
        raise UserError(f"{options.folder} has no videos ({', '.join(VIDEOS)} or .tar); give another folder")
    found = len(sources) + len(useless)
    sources = [source for source in sources if mine(source.name)]
    useless = {name: reason for name, reason in useless.items() if mine(name)}
    if not sources and not useless:
        raise UserError(
            f"--part {options.part} has none of the {found} videos: there is nothing to join of it"
        )
    load_detector(options.faces)  # say now that OpenCV is missing

    from tools.real_encode import ClipEncoder  # it needs jax, which workers do without

    encoder = ClipEncoder(
        options.model,
        blocks=options.blocks,
        motion_frames=options.motion_frames,
        filters=options.filters,
        other_light=options.other_light,
        pixels=options.pixels,
    )
    longest = options.filters.seconds[1]
    if longest * FPS < encoder.shortest:
        raise UserError(
            f"pieces of at most {longest:g} s (--filters.seconds) give no record, which takes "
            f"{encoder.shortest / FPS} s (--motion-frames, --blocks, --filters.reference-gap and one frame)"
        )
    settings = {
        **encoder.about,
        "faces": options.faces,
        "filters": dataclasses.asdict(options.filters),
    }
    with ShardWriter(options.out, shard_records=1 << 30) as writer:
        _settle(options.out, settings, begun=bool(writer.rows))
        work = options.out / WORK
        shutil.rmtree(work, ignore_errors=True)  # of a call that was killed
        if options.work is not None:  # a folder of its own, which the next call finds again
            work = options.work / f"prepare-{zlib.crc32(str(options.out.absolute()).encode()):08x}"
        shutil.rmtree(work, ignore_errors=True)
        book = Book(writer, options.out, sources, limit=options.shard_records)
        if late := book.forget_late():
            print(f"{late} videos have captions or poses now: their records are made again")
        book.forget_unsettled()
        jobs = [
            Job(source, work, encoder.sizes, options.faces, options.filters, encoder.shortest)
            for source in sources
            if source.name not in book.known
        ]
        try:
            for name, reason in useless.items():
                book.add(Outcome(name, dropped=[("whole file", reason)]), encoder)
            with Progress() as progress, contextlib.closing(cut_all(jobs, options.workers)) as outcomes:
                for outcome in progress.track(outcomes, total=len(jobs), description="preparing videos"):
                    book.add(outcome, encoder)
        finally:
            shutil.rmtree(work, ignore_errors=True)  # first: a full disk has room again
            book.save()
        if not writer.rows:
            raise UserError(f"none of {len(sources)} videos gave a clip; {options.out / REPORT} says why")
        keep_negative(options.out, options.negative_prompt, encoder)
        vae = encoder.config.vae
        writer.finish(mean=np.array(vae.latent_mean), std=np.array(vae.latent_std), encoder=settings)
    dropped = sum(1 for video in book.videos if not video["records"])
    print(
        f"{options.out}: {len(writer)} records ({book.poses} with poses) of {len(book.videos)} videos, "
        f"{dropped} of no use ({REPORT})"
    )


def share(part: str) -> Callable[[str], bool]:
    """Whether a video is of the share K of N; by its name alone, so that later videos move no other.

    Raises UserError for what is not K/N.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"--part {part}: give a number and how many there are, as in 2/8")
    return lambda name: zlib.crc32(name.encode()) % count == index - 1


def keep_negative(out: Path, prompt: str | None, encoder: ClipEncoder) -> None:
    """Write the negative prompt beside the records, unless it is there; None: any that is there will do, else
    the empty one. Models without a text encoder, which take the words themselves, have none."""
    if encoder.config.text is None:
        return
    found = read_negative(out)
    if found is None or prompt not in (None, found[0]):
        states = encoder.read(prompt or "")
        assert states is not None
        write_negative(out, prompt or "", states)


def _settle(out: Path, settings: dict[str, Any], *, begun: bool) -> None:
    """Records of one folder are of one kind; while there are none, all videos are looked at again.

    What the folder of an earlier version does not tell is not compared. Raises UserError.
    """
    if (out / RENDERED).is_file():
        raise UserError(f"{out} holds rendered clips; choose another --out for real ones")
    if (difference := first_difference(out / PREPARED, settings)) is not None:
        if begun:
            raise UserError(f"{out} was made with {_told(*difference)}; choose another --out, or remove it")
        for name in (JOURNAL, NEGATIVE):
            (out / name).unlink(missing_ok=True)
    write_note(out / PREPARED, settings)


def _told(name: str, found: Any, wanted: Any) -> str:
    """A setting that differs, in the words of the options."""
    if name == "clip_frames":
        return f"another length: clips of {found} frames, not {wanted} (--blocks)"
    if name.startswith(("motion", "other", "faces", "filters", "pixels")):
        return f"--{name.replace('_', '-')} {found}, not {wanted}"
    return f"another model: {name} {found}, not {wanted}"


def cut_all(jobs: Sequence[Job], workers: int) -> Generator[Outcome]:
    """`cut_video` of all jobs in order, by so many processes. A video that kills its process is reported.

    Raises UserError as `cut_video`, when that video's turn has come.
    """
    if not workers:
        yield from map(cut_video, jobs)
        return
    context = multiprocessing.get_context("spawn")  # forked threads of jax and ffmpeg would hang
    stop = context.Event()

    def pool(size: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(size, context, start_worker, (stop,))

    waiting = collections.deque(jobs)
    running: collections.deque[tuple[Job, Future[Outcome]]] = collections.deque()
    executor = pool(workers)
    try:
        while waiting or running:
            try:
                while waiting and len(running) <= workers:  # few ahead: what they cut out lies on the disk
                    running.append((waiting[0], executor.submit(cut_video, waiting[0])))
                    waiting.popleft()
                outcome = running[0][1].result()
            except BrokenProcessPool:  # one of those that run is to blame: each gets a process of its own
                suspects = [job for job, _ in running]
                running.clear()
                executor.shutdown()
                for suspect in suspects:
                    yield _cut_alone(suspect, pool(1))
                executor = pool(workers)
                continue
            running.popleft()
            yield outcome
    except Interrupted:
        raise KeyboardInterrupt from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _cut_alone(job: Job, executor: ProcessPoolExecutor) -> Outcome:
    with executor:
        try:
            return executor.submit(cut_video, job).result()
        except BrokenProcessPool:
            return Outcome(job.source.name, dropped=[("whole video", CRASHED)])


if __name__ == "__main__":
    configure_jax()
    sys.exit(run(lambda: main(sys.argv[1:])))
