"""Make training records of videos: `python tools/prepare_data.py FOLDER_OF_VIDEOS --out SHARDS`.

Any container, size and rate, also inside of WebDataset tars; NAME.txt beside NAME.mp4 is its caption,
NAME.pose.mp4 a video of its driving poses. Shots with exactly one face and audible speech become clips of 25
frames a second; `report.html` in the output says what was dropped and why. The same command goes on after an
interruption, adds new videos, looks again at those that gave nothing and have changed since, and takes
captions and poses that came later (not changed ones: they, other filters and other faces need another --out).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
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
from PIL import Image
from rich.progress import Progress
from tyro.conf import arg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import configure_jax, parse_options, run
from lavatar_jax.data.clip_filters import FPS, FilterConfig
from lavatar_jax.data.face_boxes import load_detector
from lavatar_jax.data.made_with import first_difference, write_note
from lavatar_jax.data.negative_prompt import read_negative, write_negative
from lavatar_jax.data.preparation_report import render_report
from lavatar_jax.data.records import file_name
from lavatar_jax.data.shards import PREPARED, RENDERED, ShardWriter
from lavatar_jax.errors import UserError
from lavatar_jax.files import write_errors, write_text
from tools.real_clips import CRASHED, Interrupted, Job, Outcome, cut_video, start_worker
from tools.real_sources import BROKEN_TAR, LONE_POSE, NO_CAPTION, VIDEOS, Source, find_sources, read_caption

if TYPE_CHECKING:
    from tools.real_encode import ClipEncoder

JOURNAL, REPORT = "videos.jsonl", "report.html"
WORK, PICTURES = ".work", "pictures"
UNSETTLED = frozenset((BROKEN_TAR, LONE_POSE, CRASHED))  # reasons that may be gone at the next look
SHEET_CLIPS, SHEET_FRAMES, SHEET_HEIGHT = 60, 5, 112  # of the report


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
    negative_prompt: str = ""
    """What guidance may lead away from in stage 2; encoded where the model has a text encoder."""
    motion_frames: int = 9
    """Frames before a clip that are kept as its past; 1 + 4k."""
    other_light: float = 0.0
    """Share of references in another light than their clip, so that colours are not simply copied."""
    part: str = "1/1"
    """K/N: only the K-th of N shares of the videos; tools/join_data.py joins what N machines made."""
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
    sources = [source for source in sources if mine(source.name)]
    useless = {name: reason for name, reason in useless.items() if mine(name)}
    load_detector(options.faces)  # say now that OpenCV is missing

    from tools.real_encode import ClipEncoder  # it needs jax, which workers do without

    encoder = ClipEncoder(
        options.model,
        blocks=options.blocks,
        motion_frames=options.motion_frames,
        filters=options.filters,
        other_light=options.other_light,
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
        shutil.rmtree(work, ignore_errors=True)
        book = Book(writer, options, sources)
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


def keep_negative(out: Path, prompt: str, encoder: ClipEncoder) -> None:
    """Write the negative prompt beside the records, unless it is there. Models without a text encoder, which
    take the words themselves, have none."""
    if encoder.config.text is None:
        return
    found = read_negative(out)
    if found is None or found[0] != prompt:
        states = encoder.read(prompt)
        assert states is not None
        write_negative(out, prompt, states)


def _settle(out: Path, settings: dict[str, Any], *, begun: bool) -> None:
    """Records of one folder are of one kind; while there are none, all videos are looked at again.

    What the folder of an earlier version does not tell is not compared. Raises UserError.
    """
    if (out / RENDERED).is_file():
        raise UserError(f"{out} holds rendered clips; choose another --out for real ones")
    if (difference := first_difference(out / PREPARED, settings)) is not None:
        if begun:
            raise UserError(f"{out} was made with {_told(*difference)}; choose another --out, or remove it")
        (out / JOURNAL).unlink(missing_ok=True)
    write_note(out / PREPARED, settings)


def _told(name: str, found: Any, wanted: Any) -> str:
    """A setting that differs, in the words of the options."""
    if name == "clip_frames":
        return f"another length: clips of {found} frames, not {wanted} (--blocks)"
    if name.startswith(("motion", "other", "faces", "filters")):
        return f"--{name.replace('_', '-')} {found}, not {wanted}"
    return f"another model: {name} {found}, not {wanted}"


class Book:
    """What became of every video: a line in `videos.jsonl` once its records are in a complete shard.

    A kill therefore costs the videos since the last shard, which are done again; their records are new ones.
    """

    def __init__(self, writer: ShardWriter, options: Prepare, sources: Sequence[Source]) -> None:
        self._writer, self._out, self._limit = writer, options.out, options.shard_records
        self._sources = {source.name: source for source in sources}
        path = options.out / JOURNAL
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        self.videos: list[dict[str, Any]] = [entry for line in lines if (entry := _parse(line))]
        self._pending: list[dict[str, Any]] = []
        self.known = {video["name"] for video in self.videos}
        # Of a video that a kill cut short, some records may be in a complete shard.
        self._earlier = collections.Counter(row.get("video") for row in writer.rows)

    @property
    def poses(self) -> int:
        """Records in complete shards that have a pose."""
        return sum("pose" in row["shapes"] for row in self._writer.rows)

    def _stamps(self, name: str) -> dict[str, tuple[int, int] | None]:
        """Of a video's file, and of its pose's."""
        if (source := self._sources.get(name)) is None:
            return {}
        return {"stamp": source.stamp, "pose": None if source.pose is None else source.pose.stamp}

    def forget_late(self) -> int:
        """Forget the videos with records whose captions or poses came later; returns how many."""
        told = {video["name"]: video for video in self.videos if video["records"]}
        noted = {name: video["notes"] for name, video in told.items()}
        bare = {row.get("video") for row in self._writer.rows if "pose" not in row["shapes"]}

        def captioned(source: Source) -> bool:
            unknown = source.captioned and not NO_CAPTION.isdisjoint(noted.get(source.name, ()))
            return unknown and read_caption(source)[1] is None

        def posed(source: Source) -> bool:
            if source.pose is None or source.name not in bare:
                return False
            before = told.get(source.name, {}).get("pose")  # of one that was of no use
            return before is None or tuple(before) != source.pose.stamp

        late = {name for name, source in self._sources.items() if captioned(source) or posed(source)}
        if late:
            # The records first: a video that the journal has still is found here again.
            self._writer.forget(lambda row: row.get("video") in late)
            self.videos = [video for video in self.videos if video["name"] not in late]
            self.known -= late
            self._earlier -= collections.Counter({name: self._earlier[name] for name in late})
            self.save()
        return len(late)

    def forget_unsettled(self) -> None:
        """Forget what is not as the journal has it: videos whose records are gone, with a shard that was
        removed say; and what gave no records where another look may tell more: the file has changed since (it
        was still being copied, say), or the process died (the system may have had no memory left)."""

        def settled(video: dict[str, Any]) -> bool:
            if self._earlier[video["name"]] < video["records"]:
                return False
            before, now = video.get("stamp"), self._stamps(video["name"]).get("stamp")
            changed = before is not None and now is not None and tuple(before) != now
            crashed = any(reason in UNSETTLED for _, reason in video["dropped"])
            return bool(video["records"]) or not (changed or crashed)

        self.videos = [video for video in self.videos if settled(video)]
        self.known = {video["name"] for video in self.videos}

    def add(self, outcome: Outcome, encoder: ClipEncoder) -> None:
        """Encode a video's pieces, write their records, remove the pieces."""
        if outcome.name in self.known:
            return
        self.known.add(outcome.name)
        video = {
            "video": outcome.name,
            "w": outcome.width,
            "h": outcome.height,
            "fps": round(outcome.fps, 3),
        }
        written = 0
        for piece in outcome.pieces:
            first = True
            shown = [path for path in (piece.frames, piece.pose) if path is not None]
            facts = {"loudness": piece.level_db, **video}
            if piece.n_faces is not None:
                facts["n_faces"] = piece.n_faces
            for frame, record in encoder.records(outcome, piece, self._writer.ids):
                when = {"start": frame / FPS, "end": (frame + encoder.clip_frames) / FPS}
                try:
                    self._writer.write(record, **when, **facts)
                except ValueError as error:  # half precision has an end
                    outcome.dropped.append((f"{record['id']} ({error})", "latents are not finite"))
                    continue
                written += 1
                if first:
                    self._keep_picture(str(record["id"]), shown)
                first = False
            for path in shown:
                path.unlink()  # a video's pieces are large
        records = self._earlier[outcome.name] + written
        for folder in {piece.frames.parent for piece in outcome.pieces}:
            shutil.rmtree(folder, ignore_errors=True)
        self._pending.append(
            {
                "name": outcome.name,
                **self._stamps(outcome.name),
                "seconds": round(outcome.seconds, 2),
                "fps": round(outcome.fps, 3),
                "records": records,
                "frames": records * encoder.clip_frames,
                "pieces": [{"face": piece.face, "level_db": piece.level_db} for piece in outcome.pieces],
                "dropped": outcome.dropped,
                "notes": outcome.notes,
            }
        )
        if self._writer.unsaved >= self._limit:
            self.save()

    def save(self) -> None:
        """Complete the shard, then say so, and write the report."""
        self._writer.flush()
        self.videos += self._pending
        self._pending = []
        lines = (json.dumps(video, ensure_ascii=False) + "\n" for video in self.videos)
        write_text(self._out / JOURNAL, "".join(lines))
        paths = sorted((self._out / PICTURES).glob("*.jpg"))
        pictures = {path.stem: path.read_bytes() for path in paths[:SHEET_CLIPS]}
        write_text(self._out / REPORT, render_report(self.videos, pictures, self.poses))

    def _keep_picture(self, name: str, videos: Sequence[Path]) -> None:
        """Some frames side by side for the report, those of one video above those of the next."""
        folder = self._out / PICTURES
        with write_errors(folder):
            folder.mkdir(exist_ok=True)
            if sum(1 for _ in folder.iterdir()) >= SHEET_CLIPS:
                return
            rows = []
            for path in videos:
                frames = np.load(path, mmap_mode="r")
                chosen = frames[np.linspace(0, len(frames) - 1, SHEET_FRAMES).astype(int)]
                rows.append(np.concatenate(list(chosen), axis=1))
            strip = Image.fromarray(np.concatenate(rows))
            height = SHEET_HEIGHT * len(rows)
            width = round(strip.width * height / strip.height)
            data = io.BytesIO()
            strip.resize((width, height), Image.Resampling.LANCZOS).save(data, format="JPEG", quality=80)
            (folder / f"{file_name(name)}.jpg").write_bytes(data.getvalue())


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


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
