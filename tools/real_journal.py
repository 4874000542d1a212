"""What became of each video of a preparation: its journal, its pictures and its report."""

from __future__ import annotations

import collections
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lavatar_jax.data.clip_filters import FPS
from lavatar_jax.data.preparation_report import render_report
from lavatar_jax.data.records import file_name
from lavatar_jax.data.shards import ShardWriter
from lavatar_jax.files import write_errors, write_text
from tools.real_clips import CRASHED, Outcome
from tools.real_sources import BROKEN_TAR, LONE_POSE, NO_CAPTION, Source, read_caption

if TYPE_CHECKING:
    from tools.real_encode import ClipEncoder

JOURNAL, REPORT, PICTURES = "videos.jsonl", "report.html", "pictures"
UNSETTLED = frozenset((BROKEN_TAR, LONE_POSE, CRASHED))  # reasons that may be gone at the next look
SHEET_CLIPS, SHEET_FRAMES, SHEET_HEIGHT = 60, 5, 112  # of the report


class Book:
    """What became of every video: a line in `videos.jsonl` once its records are in a complete shard.

    A kill therefore costs the videos since the last shard, which are done again; their records are new ones.
    `limit`: records of a shard.
    """

    def __init__(self, writer: ShardWriter, out: Path, sources: Sequence[Source], *, limit: int) -> None:
        self._writer, self._out, self._limit = writer, out, limit
        self._sources = {source.name: source for source in sources}
        self.videos = read_journal(out)
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


def read_journal(out: Path) -> list[dict[str, Any]]:
    """What became of the videos of a folder so far; damaged lines are left out."""
    path = out / JOURNAL
    # Not `splitlines`: names may hold what Unicode takes for an end of line.
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [entry for line in lines if (entry := _parse(line))]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
