"""Several sessions on one pipeline: opening, saving, restoring, and a thread that serves them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from lavatar_jax.errors import UserError
from lavatar_jax.inference.delivery import OnBlock
from lavatar_jax.inference.hearing import Hearing, try_ear
from lavatar_jax.inference.listen import frames_per_block, make_stream
from lavatar_jax.inference.pipeline import Pipeline
from lavatar_jax.inference.portrait import hashed_words, portrait_conditions, video_sides
from lavatar_jax.inference.prompt_reader import PromptDesk
from lavatar_jax.inference.rollout import Draws
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.session_core import SessionCore, SessionOptions
from lavatar_jax.inference.session_loop import SessionLoop
from lavatar_jax.inference.session_state import load_state, save_state
from lavatar_jax.models.avatar import Avatar
from lavatar_jax.parallel import PipelineLayout
from lavatar_jax.types import Conditions

Image = UInt8[np.ndarray, "H W 3"]


class Busy(UserError):  # noqa: N818 - an answer, not a fault
    """Every slot is taken; a server answers 503 with Retry-After."""


class SessionHost:
    """Owns a pipeline; its `slots` are places for sessions.

    `layout`: how the pipeline lies on `devices`, by default all of it on the first. `size`: (height, width)
    of the video in pixels, by default the model's. `parts`: blocks are decoded and handed out in so many
    parts, by default latent by latent, so that a reader has the first frames when a third of the block is
    decoded. `clock` in seconds, only ever forward. `encode_prompt` turns words into the states of the model's
    text encoder, where it has one.
    Call `step` again and again, or `start` a thread that does.
    """

    def __init__(
        self,
        avatar: Avatar,
        slots: int = 1,
        layout: PipelineLayout | None = None,
        devices: list[jax.Device] | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        size: tuple[int, int] | None = None,
        parts: int | None = None,
        encode_prompt: Callable[[str], Float[Array, "1 S E"]] | None = None,
    ) -> None:
        config = avatar.config
        self.avatar, self.slots, self.clock = avatar, slots, clock
        self.parts = parts or config.dit.block_frames
        if config.dit.block_frames % self.parts:
            raise ValueError(f"a block of {config.dit.block_frames} latents has no {self.parts} equal parts")
        self.size = size or video_sides(config)
        factor = avatar.vae.config.spatial_factor
        height, width = (side // factor for side in self.size)
        layout = layout or PipelineLayout(stages=1, own_decoder=False)
        self.pipeline = Pipeline(
            avatar.dit, avatar.vae, config.sampling,
            height=height, width=width, slots=slots, layout=layout, devices=devices,
        )  # fmt: skip
        self._encode_prompt = encode_prompt or functools.partial(hashed_words, config)
        self._block_frames = frames_per_block(avatar)
        self._ear = try_ear(make_stream(avatar), self._block_frames, config.fps)
        self._prompts = PromptDesk(self._encode_prompt)
        self._loop = SessionLoop(self.pipeline, clock, self._ear.silence, self.parts)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- sessions ----------------------------------------------------------------------------------------

    @property
    def sessions(self) -> list[AvatarSession]:
        """Those that are open."""
        with self._loop.lock:
            return self._loop.open_sessions()

    def open(
        self,
        image: Image | str | Path | Conditions,
        *,
        prompt: str | Float[Array, "1 S E"] = "",
        seed: int = 0,
        on_block: OnBlock | None = None,
        **options: Any,
    ) -> AvatarSession:
        """A new session: a photo (pixels, or a file) or conditions for this host's size, and a prompt.

        `options`: those of SessionOptions, such as live=False. `on_block` is given each block in the host's
        thread, instead of the session's iterator. Raises Busy when all slots are taken, and UserError for a
        picture or prompt that cannot be used.
        """
        opened, checked = self.clock(), self._options(options)
        if isinstance(image, Conditions) and not (isinstance(prompt, str) and not prompt):
            raise ValueError("conditions have their prompt in them: give a photo, or leave the prompt out")
        with self._reserve() as slot:
            conditions = image if isinstance(image, Conditions) else self.conditions(image, prompt)
            session = self._session(slot, checked, seed, opened, on_block)
            session.adapt_at, session.motion = self._adapt_at(), conditions.motion
            with self._loop.lock:
                try:
                    self.pipeline.open(slot, conditions)
                except ValueError as error:
                    raise UserError(str(error)) from None
                session.start(self.clock(), self.pipeline.sampling.drop_first_frames)
                self._loop.places[slot] = session
        self._wake.set()
        return session

    def conditions(self, image: Image | str | Path, prompt: str | Float[Array, "1 S E"]) -> Conditions:
        """What a photo and a prompt mean to the model, at this host's size. Raises UserError."""
        text = self._encode_prompt(prompt) if isinstance(prompt, str) else prompt
        return portrait_conditions(self.avatar, image, text, self.size)

    def _options(self, options: dict[str, Any]) -> SessionOptions:
        checked = SessionOptions(**options)
        if checked.early_exit is not None and not 0 <= checked.early_exit < self.pipeline.layout.stages - 1:
            return dataclasses.replace(checked, early_exit=None)  # there is nothing to leave early
        return checked

    @contextlib.contextmanager
    def _reserve(self) -> Iterator[int]:
        if self._thread is not None and not self.running:
            raise UserError("the server failed: no session can be opened any more; start it again")
        with self._loop.lock:
            self._loop.reap()
            free = [slot for slot in range(self.slots) if slot not in self._loop.places]
            if not free:
                raise Busy(f"all {self.slots} places are taken; try again later")
            self._loop.places[free[0]] = None
        try:
            yield free[0]
        except BaseException:
            with self._loop.lock:
                self._loop.places.pop(free[0], None)
            raise

    def _adapt_at(self) -> int | None:
        """The block from which the sink is the adapted one: there is no drain, block 0 must have come out."""
        after = self.pipeline.sampling.adapt_sink_after
        return None if after is None else max(after, self.pipeline.layout.stages)

    def _session(
        self, slot: int, options: SessionOptions, seed: int, opened: float, on_block: OnBlock | None
    ) -> AvatarSession:
        pipeline, fps = self.pipeline, self.avatar.config.fps
        shape = (1, pipeline.config.block_frames, pipeline.height, pipeline.width)
        return AvatarSession(
            slot,
            options,
            Hearing(make_stream(self.avatar), self._block_frames, fps, self._ear.delay),
            Draws(pipeline.sampling, (*shape, pipeline.config.latent_channels), seed),
            seed=seed,
            opened=opened,
            parts=self.parts,
            clock=self.clock,
            wake=self._woken,
            read_prompt=self._prompts.read,
            on_block=on_block,
        )

    # ---- saving ------------------------------------------------------------------------------------------

    def save(self, session: AvatarSession, path: str | Path) -> None:
        """Writes a session to a file, from which `restore` goes on with the next block.

        Its blocks under way come out first, to its reader; it can go on here too. Raises UserError.
        """
        session.await_prompt()  # which the saved session shall have
        with self._loop.lock:
            session.check_open()
            session.paused = True
            try:
                self._loop.set_text(session)
                slot = None
                while slot is None:
                    try:
                        slot = self.pipeline.save(session.slot)
                    except ValueError:  # still under way, or a change is
                        self._loop.tick(self._loop.feeds())
                        session.check_open()
                self._loop.deliver()
                state = session.state(slot, self._made_with())
            finally:
                session.paused = False
        save_state(path, state)

    def restore(self, path: str | Path, *, on_block: OnBlock | None = None, **options: Any) -> AvatarSession:
        """Goes on with a saved session. Raises Busy, and UserError for a file that is not one of this model
        and size."""
        opened, checked = self.clock(), self._options(options)
        with self._reserve() as slot:
            pipeline = self.pipeline
            cache = jax.eval_shape(lambda: pipeline.vae.init_decode_cache(1, pipeline.height, pipeline.width))
            state = load_state(path, cache)
            if state.model != self._made_with():
                raise UserError(f"{path} was saved with {state.model}, and this is {self._made_with()}")
            with self._loop.lock:
                try:
                    pipeline.load(slot, state.slot)
                except (ValueError, TypeError):  # of arrays that do not fit, for all that it says of itself
                    raise UserError(f"{path} is not a saved session, or is damaged") from None
                session = self._session(slot, checked, state.numbers["seed"], opened, on_block)
                session.set_state(state, self.clock())
                if session.fed == 0:  # where it comes from, block 0 may have been sooner out
                    session.adapt_at = self._adapt_at()
                self._loop.places[slot] = session
        self._wake.set()
        return session

    def _made_with(self) -> dict[str, Any]:
        config, sampling = self.avatar.config, dataclasses.asdict(self.pipeline.sampling)
        sampling = {name: list(v) if isinstance(v, tuple) else v for name, v in sampling.items()}
        return {
            "name": config.name,
            "size": list(self.size),
            "sampling": sampling,
            "weights": self._fingerprint,
        }

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Tells models apart that have one name: of the first numbers of all weights."""
        models = (self.avatar.dit, self.avatar.vae)
        first = jax.jit(lambda tree: [x[(0,) * (x.ndim - 1)][:8] for x in jax.tree.leaves(tree) if x.ndim])
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(models)]
        numbers = b"".join(np.asarray(row).tobytes() for row in first(models))
        return hashlib.sha256(repr(shapes).encode() + numbers).hexdigest()[:16]

    # ---- running ----------------------------------------------------------------------------------------

    def step(self) -> float:
        """Does what is to be done now: at most one tick. Returns in how many seconds something will be due;
        infinity: not before something is pushed or read."""
        return self._loop.step()

    def run_forever(self) -> None:
        """Steps until `close`. If the pipeline itself fails, all sessions are closed and the error raised."""
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                wait = self.step()
                if wait > 0:
                    self._wake.wait(min(wait, 1.0))
        except BaseException:
            self._close_sessions("the server failed")
            raise

    def start(self) -> None:
        """Runs `run_forever` in a thread of its own."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self.run_forever, name="sessions", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread that `start` made is at work; after a failure of the pipeline it is not."""
        return self._thread is not None and self._thread.is_alive()

    def close(self, reason: str = "the server stops") -> None:
        """Closes all sessions and ends the thread."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
        self._close_sessions(reason)

    def _close_sessions(self, reason: str) -> None:
        for session in self.sessions:
            session.close(reason)
        with self._loop.lock:
            self._loop.reap()

    def _woken(self, waiting: SessionCore | None) -> None:
        """Something was pushed or closed; or a reader waits and, without a thread, must do the work."""
        self._wake.set()
        if waiting is None:
            return
        if self._thread is not None:
            with waiting.outbox.changed:
                waiting.outbox.changed.wait_for(lambda: len(waiting.outbox) or waiting.outbox.closed)
            return
        wait = self.step()
        if len(waiting.outbox) or waiting.outbox.closed:
            return
        if wait == math.inf:
            raise RuntimeError("no block will come: push sound, and then finish()")
        if wait > 0:
            time.sleep(min(wait, 1.0))
