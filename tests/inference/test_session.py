"""Sessions on one pipeline, with a clock that only moves when told."""

import dataclasses
import itertools
import math
import threading
import time

import numpy as np
import pytest

from lavatar_jax.errors import UserError
from lavatar_jax.inference.hearing import FADE
from lavatar_jax.inference.session import AvatarSession
from lavatar_jax.inference.session_host import Busy
from lavatar_jax.inference.talk import photo_conditions, talk
from lavatar_jax.parallel import PipelineLayout
from tests.inference.hosts import (
    BLOCK,
    DROPPING,
    ONE,
    SAMPLING,
    SLOTS,
    STAGES,
    avatar,
    drain,
    frames_of,
    make_host,
    photo,
    run,
    sound_of,
    speech,
)


@pytest.mark.parametrize("layout", [ONE, STAGES], ids=["1", "2+1"])
def test_not_live_is_talk(layout: PipelineLayout) -> None:
    """The frames of the sequential rollout, for any chunking, and the very sound that was pushed."""
    sampling = dataclasses.replace(SAMPLING, adapt_sink_after=layout.stages)
    samples = speech(4.3)
    model = avatar(sampling)
    want = np.concatenate(list(talk(model, photo_conditions(model, photo()), samples, seed=3)))
    host = make_host(layout)
    session = host.open(photo(), seed=3, live=False)
    cuts = [0, 1, 700, 9000, 9001, 20000, len(samples)]
    for start, end in itertools.pairwise(cuts):
        assert session.push_audio(samples[start:end]) == end - start
        host.step()
    session.finish()
    blocks = list(session)
    assert [block.index for block in blocks] == [0, 1, 2, 3, 4]
    assert [block.time for block in blocks] == [0.0, 0.48, 0.96, 1.44, 1.92]
    np.testing.assert_allclose(frames_of(blocks).astype(int), want.astype(int), atol=1)
    np.testing.assert_array_equal(sound_of(blocks)[: len(samples)], samples)
    assert not sound_of(blocks)[len(samples) :].any()
    assert session.reason == "finished"


def test_parts_of_a_block_are_the_whole_block_sooner() -> None:
    """Latent by latent: the same frames and sound, and room and time are still counted in blocks."""
    made = {}
    for name in ("here", "parts"):
        host = make_host(sampling=DROPPING, name=name)
        session = host.open(photo(), live=False, unread=3)
        session.push_audio(speech(4.5))
        session.finish()
        while host.step() == 0.0:
            pass
        assert len(session.outbox) == 3 * host.parts
        made[name] = list(session)
        assert session.stats.blocks == 5
    whole, parts = made["here"], made["parts"]
    np.testing.assert_allclose(frames_of(parts).astype(int), frames_of(whole).astype(int), atol=1)
    np.testing.assert_array_equal(sound_of(parts), sound_of(whole))
    assert [(block.index, block.part) for block in parts] == [(i, j) for i in range(5) for j in range(3)]
    assert [block.time for block in parts] == pytest.approx([0.16 * i for i in range(15)])
    assert {len(block.frames) for block in parts} == {4}
    # An interrupt fades what is not out yet, even of a block that has begun.
    host = make_host(sampling=DROPPING, name="parts")
    session = host.open(photo())
    session.push_audio(speech(4))
    host.step()
    assert session.read().sound.any()
    session.interrupt()
    rest = [session.read().sound for _ in range(2)]
    assert rest[0][: FADE // 2].any()
    assert not rest[0][FADE:].any()
    assert not rest[1].any()


def test_nothing_is_lost_where_a_reader_is_slower_than_the_host() -> None:
    """Part by part: a block of which some parts are read still has no room for another one behind it."""
    host = make_host(sampling=DROPPING, name="parts")
    session = host.open(photo(), live=False, unread=2)
    session.push_audio(speech(9))
    session.finish()
    read = []
    while session.reason is None or len(session.outbox):
        while host.step() == 0.0:
            pass
        if (part := session.read()) is None:
            break
        read.append((part.index, part.part))
    assert read == [(block, part) for block in range(9 + 1) for part in range(3)]
    assert session.stats.dropped_frames == 0


def test_frames_that_decoding_drops_are_part_of_the_time() -> None:
    samples, model = speech(2), avatar(DROPPING)
    want = np.concatenate(list(talk(model, photo_conditions(model, photo()), samples)))
    host = make_host(sampling=DROPPING)
    session = host.open(photo(), live=False)
    session.push_audio(samples)
    session.finish()
    blocks = list(session)
    assert all(len(block.frames) == 12 for block in blocks)
    np.testing.assert_allclose(frames_of(blocks)[3:].astype(int), want.astype(int), atol=1)
    np.testing.assert_array_equal(sound_of(blocks)[3 * 640 :][: len(samples)], samples)


def test_sessions_that_share_a_host_show_what_they_show_alone() -> None:
    """Joining and leaving at any time, in any slot: not a bit differs."""

    def feed(session: AvatarSession, seed: int) -> None:
        session.push_audio(speech(5, seed))
        session.finish()

    alone = {}
    for seed in (1, 2, 3):
        host = make_host(STAGES)
        session = host.open(photo(seed), prompt=f"voice {seed}", seed=seed, live=False)
        feed(session, seed)
        alone[seed] = frames_of(list(session))
    host = make_host(STAGES)
    others = {}
    for seed in (3, 1):
        others[seed] = host.open(photo(seed), prompt=f"voice {seed}", seed=seed, live=False)
        feed(others[seed], seed)
        for _ in range(3):
            host.step()
    leaver = host.open(photo(9), live=False)
    leaver.push_audio(speech(3))
    host.step()
    leaver.close("goes away")
    others[2] = host.open(photo(2), prompt="voice 2", seed=2, live=False)
    feed(others[2], 2)
    for seed, session in others.items():
        np.testing.assert_array_equal(frames_of(list(session)), alone[seed])


def test_busy_until_somebody_leaves() -> None:
    host = make_host()
    first, *_ = [host.open(photo()) for _ in range(SLOTS)]
    with pytest.raises(Busy, match="all 3 places are taken"):
        host.open(photo())
    first.close()
    host.open(photo())
    assert first.reason == "closed"


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), "missing.png"])
def test_a_bad_picture_takes_no_slot(image) -> None:
    host = make_host()
    with pytest.raises(UserError):
        host.open(image)
    for _ in range(SLOTS):
        host.open(photo())


def test_silence_keeps_the_pace_of_the_clock() -> None:
    host = make_host()
    session = host.open(photo())
    times: list[float] = []

    def read() -> None:
        times.extend(host.clock.now for _ in drain(session))

    run(host, 4.8, read)
    assert len(times) == 10  # a block each 480 ms, none ahead of its time
    np.testing.assert_allclose(np.diff(times), 0.48, atol=0.021)
    assert session.stats.underruns == session.stats.held == 0


def test_sound_that_is_missing_in_speech_is_an_underrun_and_silence_is_not() -> None:
    host = make_host()
    session = host.open(photo())
    blocks = []

    def read() -> None:
        blocks.extend(drain(session))

    run(host, 1.0, read)
    assert session.stats.underruns == 0
    session.push_audio(speech(1.5))  # and no end of speech: more should come
    run(host, 3.0, read)
    assert session.stats.underruns == 1
    session.push_audio(speech(1.5))
    session.end_of_speech()
    run(host, 3.0, read)
    assert session.stats.underruns == 1
    heard = sound_of(blocks)
    assert np.count_nonzero(heard) == 2 * int(1.5 * BLOCK)  # nothing of it was lost


def test_a_microphone_is_heard_completely_and_in_time() -> None:
    """Chunks of 20 ms that arrive irregularly, up to 60 ms late."""
    host = make_host()
    session = host.open(photo())
    said = speech(10)
    sent = 0

    def talk_on() -> None:
        nonlocal sent
        late = 0.06 * (int(host.clock.now * 50) % 4 == 0)
        due = int((host.clock.now - 1000.0 - late) * 16_000)
        if due > sent:
            session.push_audio(said[sent:due])
            sent = max(sent, due)

    blocks = []
    run(host, 4.8, lambda: (talk_on(), blocks.extend(drain(session))))
    heard = sound_of(blocks)
    first = np.flatnonzero(heard)[0]
    np.testing.assert_array_equal(heard[first:], said[: len(heard) - first])
    assert first <= BLOCK + 1280 + 320  # one block, the look-ahead
    assert session.stats.underruns == 0
    waits = [block.latency.parts()["wait"] for block in blocks[2:]]
    assert max(waits) < 0.1


def test_speech_that_begins_in_a_block_goes_on_without_a_gap() -> None:
    """A microphone that was off: its first 300 ms are there when the block is due."""
    host = make_host()
    session = host.open(photo())
    said, sent = speech(6), 0
    blocks = []

    def talk_on() -> None:
        nonlocal sent
        blocks.extend(drain(session))
        due = int(max(0.0, host.clock.now - 1000.0 - 0.66) * 16_000)
        session.push_audio(said[sent:due]) if due > sent else None
        sent = max(sent, due)

    run(host, 3.0, talk_on)
    sound = sound_of(blocks)
    first = np.flatnonzero(sound)[0]
    np.testing.assert_array_equal(sound[first:], said[: len(sound) - first])
    assert first == pytest.approx(2 * BLOCK + 1280 + BLOCK * 180 / 480, abs=400)
    assert session.stats.underruns == 0
    assert session.stats.silence_to_speech[0] < 0.4


def test_broken_samples_are_silence_and_wrong_shapes_an_error() -> None:
    host = make_host()
    session = host.open(photo(), live=False)
    session.push_audio(np.array([np.nan, np.inf, -np.inf, 0.5], np.float32))
    session.finish()
    np.testing.assert_array_equal(sound_of(session)[:5], np.float32([0, 0, 0, 0.5, 0]))
    with pytest.raises(ValueError, match="mono"):
        host.open(photo()).push_audio(np.zeros((2, 4)))


def test_memory_is_bounded_on_both_sides() -> None:
    host = make_host()
    session = host.open(photo(), queued=2.0, unread=3)
    assert session.push_audio(speech(10)) == 32_000
    assert session.stats.dropped_samples == 10 * BLOCK - 32_000
    run(host, 4.8)
    blocks = drain(session)
    assert [block.index for block in blocks] == [7, 8, 9]
    assert session.stats.dropped_frames == 7 * 12


def test_a_reader_that_would_wait_for_ever_is_told() -> None:
    session = make_host().open(photo(), live=False)
    session.push_audio(speech(1.5))
    assert next(session).index == 0
    with pytest.raises(RuntimeError, match="no block will come"):
        next(session)


def test_without_a_clock_an_unread_session_waits_for_its_reader() -> None:
    host = make_host(STAGES)
    session = host.open(photo(), live=False, unread=3)
    session.push_audio(speech(8))
    session.finish()
    for _ in range(20):
        host.step()
    assert host.step() == math.inf
    assert len(session.outbox) == 3
    assert [block.index for block in session] == list(range(8))
    assert session.stats.dropped_frames == 0


def test_a_late_block_holds_the_last_frame_and_time_goes_on() -> None:
    host = make_host()
    session = host.open(photo())
    blocks = []
    run(host, 2.0, lambda: blocks.extend(drain(session)))
    before = len(blocks)
    session.push_audio(speech(3))
    session.end_of_speech()
    host.clock.now += 2.0  # the machine was elsewhere
    run(host, 4.0, lambda: blocks.extend(drain(session)))
    assert session.stats.held == 3
    held = [block for block in blocks if block.held]
    assert [block.index for block in held] == list(range(before, before + 3))
    for block in held:
        assert (block.frames == blocks[before - 1].frames[-1]).all()
        assert not block.sound.any()
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert len(blocks) == 1 + int(7.98 / 0.48)  # as many as have begun, the clock says
    assert np.count_nonzero(sound_of(blocks)) == 3 * BLOCK  # sound waited with the picture


def test_pauses_are_skipped_when_too_much_sound_waits() -> None:
    host = make_host()
    session = host.open(photo(), max_delay=0.1)
    pause = np.zeros(16_000, np.float32)
    session.push_audio(np.concatenate([speech(1), pause, speech(1)]))
    session.end_of_speech()
    run(host, 3.0)
    heard = sound_of(drain(session))
    assert np.count_nonzero(heard) == 2 * BLOCK
    assert session.stats.skipped_samples > 4000


def test_latency_of_a_block_and_of_speech() -> None:
    host = make_host(STAGES)
    session = host.open(photo())
    run(host, 2.0)
    drain(session)
    session.push_audio(np.concatenate([np.zeros(3200, np.float32), speech(1)]))
    pushed = host.clock.now
    session.end_of_speech()
    run(host, 2.0)
    block = next(block for block in drain(session) if block.sound.any())
    latency = block.latency
    assert latency.arrived == latency.first_speech == pushed
    assert len(latency.stages) == 2
    assert sum(latency.parts().values()) == pytest.approx(latency.out - pushed)
    assert list(session.stats.silence_to_speech) == [latency.out - pushed]
    assert block.speech == (np.flatnonzero(block.sound)[0] // 640, pushed)
    assert 0 < latency.out - pushed < 0.5
    assert session.stats.first_frame == 0.0


def test_early_exit_shows_the_first_blocks_sooner_and_changes_no_other_state() -> None:
    def blocks(early_exit) -> tuple[list, list]:
        host = make_host(STAGES)
        session = host.open(photo(), live=False, early_exit=early_exit)
        session.push_audio(speech(4))
        session.finish()
        return session, list(session)

    plain, want = blocks(None)
    early, got = blocks(0)
    assert early.stats.early == 1
    assert [block.early for block in got] == [True, False, False, False]
    assert len(got[0].latency.stages) == 1
    assert (got[0].frames != want[0].frames).any()
    assert len(got) == len(want) == 4
    assert plain.stats.early == 0
    one = make_host().open(photo(), early_exit=0)
    assert one.options.early_exit is None  # one stage has nothing to leave early


def test_a_thread_serves_readers_and_ends() -> None:
    host = make_host()
    host.start()
    done = []

    def read(session: AvatarSession) -> None:
        done.append(len(list(session)))

    threads = []
    for seed in range(2):
        session = host.open(photo(seed), live=False, unread=2)  # the host must wait for the reader
        session.push_audio(speech(9, seed))
        session.finish()
        threads.append(threading.Thread(target=read, args=(session,)))
        threads[-1].start()
    start = time.monotonic()
    for thread in threads:
        thread.join(60)
    assert done == [9, 9]
    assert time.monotonic() - start < 5.0  # and is not asleep when there is room again
    left = host.open(photo())
    host.close()
    assert left.reason == "the server stops"


def test_nobody_waits_at_a_host_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host()

    def fail() -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(host, "step", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    host.start()
    assert host._thread is not None
    host._thread.join(10)
    with pytest.raises(UserError, match="the server failed"):
        host.open(photo())
    host.close()
    monkeypatch.undo()
    host.open(photo()).close()


def test_conditions_have_their_prompt_in_them() -> None:
    host = make_host()
    conditions = host.conditions(photo(), "smiling")
    host.open(conditions).close()
    with pytest.raises(ValueError, match="leave the prompt out"):
        host.open(conditions, prompt="smiling")
