"""What one session hears and shows, block by block: the host's side of an `AvatarSession`.

Time is counted in blocks: block after block, each 480 ms, whether it is speech, silence or (late) the last
frame held. Nothing else adds to or takes from the time, so sound, frames and clock cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from lavatar_jax.inference.audio_queue import AudioQueue, Heard, loud_pieces
from lavatar_jax.inference.delivery import Delivery, OnBlock, Passenger
from lavatar_jax.inference.hearing import Hearing
from lavatar_jax.inference.latency import BlockLatency, SessionStats
from lavatar_jax.inference.pace import Pace
from lavatar_jax.inference.pipeline import Feed, Finished, SlotState
from lavatar_jax.inference.rollout import Draws
from lavatar_jax.inference.session_state import SessionState
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.inference.spoken import Outbox
from lavatar_jax.types import BlockInput

PAUSE = 15  # pieces of 20 ms: so much silence ends speech


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a session runs. Times in seconds.

    `live`: paced by the clock, silence is filled in, and a reader that does not read loses the oldest blocks.
    Otherwise as fast as sound comes and the reader reads, and nothing is lost.
    """

    live: bool = True
    lead: float = 0.0  # a block whose sound is there may start so long before its time
    slack: float = 0.1  # a block waits so long beyond its time for sound that is being spoken
    cushion: float = 0.3  # later than this after its time, a block is late and the last frame held
    max_delay: float | None = None  # microphones: when more sound waits, pauses are skipped; None: never
    queued: float = 60.0  # room for sound that waits
    unread: int = 8  # blocks that wait for the reader
    # Show a first block (of the video, or of speech after silence) after this stage; the sooner, the coarser.
    early_exit: int | None = None


class SessionCore:
    """State of a session, and what the host's thread does with it.

    The lock guards what readers and speakers touch too: the sound that waits, and blocks on their way. They
    may be an event loop, so it is held for moments only: features and noise are made without it.
    """

    def __init__(
        self,
        slot: int,
        options: SessionOptions,
        hearing: Hearing,
        draws: Draws,
        *,
        seed: int,
        opened: float,
        parts: int,
        clock: Callable[[], float],
        wake: Callable[[SessionCore | None], None],
        read_prompt: Callable[[str | Array], Future[Array]],
        on_block: OnBlock | None = None,
    ) -> None:
        self.slot, self.options, self.seed = slot, options, seed
        self.reason: str | None = None
        self.stats = SessionStats(opened=opened)
        self.outbox = Outbox(options.unread * parts)
        self.paused = False
        self.interrupted = False  # until the host has told the pipeline
        # Adaptive sink: from block `adapt_at` on, block 0's first latent replaces the photo.
        self.adapt_at: int | None = None
        self.adapted: Array | None = None
        self.motion: Array | None = None
        self._clock, self._wake, self._read_prompt = clock, wake, read_prompt
        self._text: Future[Array] | None = None  # of a new prompt, until the host has set it
        self._hearing, self._draws = hearing, draws
        self._queue = AudioQueue(int(options.queued * SAMPLE_RATE))
        self._pace = Pace(hearing.block / SAMPLE_RATE, options.cushion)
        self._lock = threading.RLock()
        self._delivery = Delivery(
            frames=hearing.frames, samples=hearing.block, fps=hearing.fps, parts=parts,
            pace=self._pace if options.live else None, outbox=self.outbox, stats=self.stats,
            clock=clock, lock=self._lock, on_block=on_block,
        )  # fmt: skip
        self._ended = True  # no more sound is announced
        self._finishing = False
        self._quiet = PAUSE  # pieces of silence heard last
        self._gap = False  # silence was filled in at the end of the last block
        self._onsets: deque[tuple[int, float]] = deque()  # where speech begins, and when that had arrived
        self._last_real = 0  # where the last sound that was not filled in ends
        self._unsent: deque[Passenger] = deque()
        self._flying: dict[int, Passenger] = {}
        self._noise = draws.noise(0)
        self.fed = 0  # blocks

    def start(self, now: float, dropped_frames: int) -> None:
        """Time begins. Frames that decoding drops at the beginning have silence of their own."""
        self._hearing.push(np.zeros(dropped_frames * SAMPLE_RATE // self._hearing.fps, np.float32))
        self._hearing.listen()
        self._pace.start(now)

    def due(self) -> float:
        """When the next block may enter the pipeline, in the clock's time; infinity: not before something
        is pushed or read."""
        if self.paused or self.reason is not None:
            return math.inf
        with self._lock:
            ready = len(self._queue) >= self._hearing.missing()
            if not self.options.live:
                # A block of which a part is unread still takes the place of a block.
                blocks = -(-len(self.outbox) // self._delivery.parts) + len(self._unsent)
                room = blocks < self.options.unread
                return -math.inf if room and (ready or (self._ended and self._unheard())) else math.inf
            start = self._pace.begins(self.fed + self._delivery.held)
            if ready:
                return start - self.options.lead
            expecting = not self._ended and self._quiet < PAUSE
            return start + self.options.slack if expecting else start

    def new_text(self) -> Array | None:
        """The states of a new prompt, once, when they have been read. Raises what reading them raised."""
        with self._lock:
            text = self._text
            if text is None or not text.done():
                return None
            self._text = None
        return text.result()

    def _unheard(self) -> bool:
        """Whether there is sound that is in no block yet."""
        return len(self._queue) > 0 or self._hearing.taken * self._hearing.block < self._last_real

    def next_feed(self, now: float) -> Feed | None:
        """The next block if it is due, with what is heard in it."""
        if now < self.due():
            return None
        with self._lock:
            if self.options.live and self.options.max_delay is not None:
                longest = self._hearing.block + int(self.options.max_delay * SAMPLE_RATE)
                self.stats.skipped_samples += self._queue.skip_silence(longest)
            latency = self._hear(now)
        self._hearing.listen()
        latency.heard = self._clock()
        with self._lock:  # after an interrupt meanwhile, the sound has faded
            features, sound = self._hearing.take()
            passenger = Passenger(index=self.fed, sound=sound, latency=latency)
            ends = self._hearing.taken * self._hearing.block
            while self._onsets and self._onsets[0][0] < ends:
                position, latency.first_speech = self._onsets.popleft()
                passenger.speech_at = position - ends + self._hearing.block
            first = self.fed == 0 or passenger.speech_at is not None
            exit_stage = self.options.early_exit if first and not self._flying else None
            self._unsent.append(passenger)
            self._flying[self.fed] = passenger
            self.fed += 1
        # Features stay on the host: the pipeline knows where they belong.
        inputs, noise = BlockInput(features[None, None]), self._noise  # type: ignore[arg-type]
        distances = self._draws.distances(passenger.index)
        self._noise = self._draws.noise(self.fed)  # before the tick, which it would otherwise wait for
        return Feed(passenger.index, noise, inputs, distances, exit_stage)

    def _hear(self, now: float) -> BlockLatency:
        """Takes what waits for the ear, and silence for the rest: behind it, or in front where speech has
        just begun, so that it goes on in the next block without a gap."""
        latency = BlockLatency(taken=now)
        missing = self._hearing.missing()
        heard = self._queue.take(missing)
        filled = missing - len(heard.samples)
        begins = not self._ended and self._quiet >= PAUSE
        behind = filled > 0 and not begins
        if behind and not self._ended and (len(heard.samples) > 0 or not self._gap):
            self.stats.underruns += self.options.live
        self._gap = behind
        latency.arrived = heard.arrival()
        front = filled if begins else 0
        if len(heard.samples):
            self._find_speech(heard, self._hearing.heard + front)
            self._last_real = self._hearing.heard + front + len(heard.samples)
        self._quiet += 0 if begins else filled * 50 // SAMPLE_RATE
        self._hearing.push(np.pad(heard.samples, (front, filled - front)))
        return latency

    def _find_speech(self, heard: Heard, position: int) -> None:
        """Notes where speech begins after a pause."""
        for piece, loud in enumerate(loud_pieces(heard.samples)):
            if loud and self._quiet >= PAUSE:
                sample = piece * SAMPLE_RATE // 50
                self._onsets.append((position + sample, heard.arrival(sample) or 0.0))
            self._quiet = 0 if loud else self._quiet + 1

    def entered(self, now: float) -> None:
        """The tick with the last feed was given out."""
        self._unsent[-1].latency.fed = now

    def passed_stage(self, now: float) -> None:
        """A tick is done."""
        for passenger in self._unsent:
            if not passenger.shown:
                passenger.latency.stages.append(now)

    def came_out(self, block: Finished) -> Passenger | None:
        """A block left the pipeline; returns its passenger if its frames are wanted.

        What was shown early is not shown again; the latent that becomes the sink is always the final one.
        """
        if block.early:
            self._flying[block.index].early = True
            return self._flying[block.index]
        passenger = self._flying.pop(block.index)
        if block.index == 0 and self.adapt_at is not None:
            self.adapted = block.latent[:, :1]
        return None if passenger.shown else passenger

    def deliver(self, passenger: Passenger, frames: UInt8[np.ndarray, "T H W 3"], decoded: float) -> None:
        """Hand out the next part of a block."""
        if self._delivery.send(passenger, frames, decoded):
            with self._lock:
                assert self._unsent.popleft() is passenger

    def hold_if_late(self, now: float) -> None:
        """Cover for a block that should be out."""
        self._delivery.hold_if_late(now)

    def late_at(self) -> float:
        """When the next block is late, in the clock's time."""
        return self._delivery.late_at()

    @property
    def settled(self) -> bool:
        """Nothing of this session is under way."""
        return not self._unsent and not self._flying

    @property
    def finished(self) -> bool:
        return self._finishing and self.settled and not self._unheard()

    def state(self, slot: SlotState, model: dict[str, Any]) -> SessionState:
        """What `set_state` of a new session goes on with; only when this one is settled."""
        with self._lock:
            numbers = {
                "seed": self.seed,
                "adapt_at": -1 if self.adapt_at is None else self.adapt_at,
                "fed": self.fed,
                "out": self._delivery.out,
                "quiet": self._quiet,
                "last_real": self._last_real,
                "ended": int(self._ended),
                "finishing": int(self._finishing),
            }
            pending = self.adapt_at is not None and self.fed <= self.adapt_at
            return SessionState(
                slot=slot,
                hearing=self._hearing.state(),
                waiting=self._queue.peek(),
                adapted=np.asarray(self.adapted) if pending and self.adapted is not None else None,
                motion=np.asarray(self.motion) if pending and self.motion is not None else None,
                last_frame=self._delivery.last_frame,
                numbers=numbers,
                model=model,
            )

    def set_state(self, state: SessionState, now: float) -> None:
        """Go on where `state` was taken; time goes on now."""
        numbers = state.numbers
        self.adapt_at = None if numbers["adapt_at"] < 0 else numbers["adapt_at"]
        self.adapted, self.motion = jax.tree.map(jnp.asarray, (state.adapted, state.motion))
        self._delivery.last_frame = state.last_frame
        self.fed, self._delivery.out = numbers["fed"], numbers["out"]
        self._delivery.held = numbers["out"] - numbers["fed"]
        self._quiet, self._last_real = numbers["quiet"], numbers["last_real"]
        self._ended = bool(numbers["ended"])
        self._finishing = bool(numbers.get("finishing", 0))  # sessions of earlier versions do not tell
        self._hearing.set_state(state.hearing)
        self._queue.push(state.waiting, now)
        self._noise = self._draws.noise(self.fed)
        self._pace.start(now, numbers["out"])
