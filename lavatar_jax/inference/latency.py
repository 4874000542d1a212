"""Where the time of a block goes, and the two waits that a user feels."""

from __future__ import annotations

import dataclasses
from collections import deque
from itertools import pairwise


@dataclasses.dataclass(kw_only=True)
class BlockLatency:
    """When things happened to one block, in seconds of the host's clock.

    `stages`: when each pass through the pipeline was done (a live host waits for each; where nobody is live,
    when the next one was given out). None where it did not happen: silence that was filled in never arrived.
    """

    arrived: float | None = None  # the last of its samples
    taken: float  # the host decides to make it: before this it waits
    heard: float = 0.0  # its features are there
    fed: float = 0.0  # it enters the first stage
    stages: list[float] = dataclasses.field(default_factory=list)
    decoded: float = 0.0  # the frames of its first part are on the host
    out: float = 0.0  # they are handed to the reader
    complete: float = 0.0  # so is its last part
    first_speech: float | None = None  # arrival of the first loud sample after a pause, if it is in here

    def parts(self) -> dict[str, float]:
        """Seconds of each part; they add up to the time from `arrived` (or, unknown, `taken`) to `out`."""
        passes = [self.fed, *self.stages]
        parts = {"wait": self.taken - self.arrived} if self.arrived is not None else {}
        parts |= {"features": self.heard - self.taken, "feed": self.fed - self.heard}
        parts |= {f"stage{k}": after - before for k, (before, after) in enumerate(pairwise(passes))}
        return parts | {"decode": self.decoded - passes[-1], "out": self.out - self.decoded}


@dataclasses.dataclass(kw_only=True)
class SessionStats:
    """Counters of a session, and its waits in seconds. The newest of each list are kept."""

    opened: float
    blocks: int = 0  # handed out, held ones included
    held: int = 0  # a block was late: the last frame stood still for its time
    underruns: int = 0  # sound was missing in the middle of speech
    dropped_frames: int = 0  # nobody read them
    dropped_samples: int = 0  # no room for them
    skipped_samples: int = 0  # of pauses, to catch up
    early: int = 0  # blocks shown before their last steps
    first_audio: float | None = None
    first_out: float | None = None
    # Last silent sample in to the part with the first speaking frame out.
    silence_to_speech: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=100))

    @property
    def first_frame(self) -> float | None:
        """Opening to first frame out."""
        return None if self.first_out is None else self.first_out - self.opened

    @property
    def ttff(self) -> float | None:
        """Time to first frame as the paper defines it: from the first sound, or from opening without any."""
        if self.first_out is None:
            return None
        heard = self.first_audio if self.first_audio is not None else self.opened
        return self.first_out - min(heard, self.first_out)
