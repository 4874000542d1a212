"""What comes between a session and its blocks: interruptions, prompts, a fault, a restart elsewhere."""

import threading

import jax
import numpy as np
import pytest

from lavatar_jax.errors import UserError
from lavatar_jax.inference.hearing import FADE
from lavatar_jax.inference.prompt_reader import PromptDesk
from lavatar_jax.inference.session_host import Busy
from tests.inference.hosts import (
    BLOCK,
    DROPPING,
    SLOTS,
    STAGES,
    drain,
    frames_of,
    make_host,
    photo,
    run,
    sound_of,
    speech,
)


def frame_steps(blocks) -> np.ndarray:
    """Mean difference of each frame to the one before."""
    return np.abs(np.diff(frames_of(blocks).astype(float), axis=0)).mean(axis=(1, 2, 3))


def test_interrupt() -> None:
    """The old sound fades within 5 ms, the next block's is silent, and the picture moves on as before."""
    host = make_host(STAGES)
    session = host.open(photo())
    session.push_audio(speech(20))
    before = []
    run(host, 3.0, lambda: before.extend(drain(session)))
    while not len(session.outbox):
        run(host, 0.02)
    session.interrupt()
    assert session.queued_seconds == 0
    after = []
    run(host, 3.0, lambda: after.extend(drain(session)))
    sound = sound_of(after)
    assert sound[: FADE // 2].any()
    assert not sound[FADE:].any()
    assert np.abs(sound[:FADE]).max() <= 1.0
    assert abs(sound[FADE - 1]) < 0.01
    motion = frame_steps(before[1:])
    assert frame_steps([before[-1], *after])[:36].max() <= 1.1 * motion.max()
    session.push_audio(speech(2))  # and it can talk again
    session.end_of_speech()
    run(host, 3.0)
    assert np.count_nonzero(sound_of(drain(session))) == 2 * BLOCK


def test_after_an_interrupt_the_avatar_does_what_it_does_in_silence() -> None:
    """From the block after the interrupt on, features are those of silence."""
    host = make_host()
    session = host.open(photo())
    session.push_audio(speech(20))
    run(host, 2.0)
    session.interrupt()
    taken = session._hearing.taken
    heard = []
    take = session._hearing.take
    session._hearing.take = lambda: heard.append(take()) or heard[-1]
    run(host, 2.0)
    assert session._hearing.taken > taken + 2
    silent = heard[-1][0]
    assert np.ptp(silent, axis=-1).max() == 0
    frames_of_old_speech = np.abs(heard[0][0] - silent).max(axis=(0, 1)) > 0
    assert frames_of_old_speech.nonzero()[0].max(initial=-1) < 4  # the look-ahead it had already heard
    assert not any(np.abs(features - silent).any() for features, _ in heard[1:])


def test_a_prompt_can_change() -> None:
    def last(prompts: list[str]) -> np.ndarray:
        host = make_host()
        session = host.open(photo(), prompt="calm", live=False)
        for prompt in prompts:
            session.set_prompt(prompt)
            session.push_audio(speech(1))
            host.step()
        session.finish()
        return list(session)[-1].frames

    np.testing.assert_array_equal(last(["calm", "calm"]), last(["calm", "calm"]))
    assert (last(["calm", "angry"]) != last(["calm", "calm"])).any()


def test_nobody_waits_for_a_prompt_that_is_being_read(monkeypatch, tmp_path) -> None:
    """Neither who sends it nor the blocks; only who saves the session, which shall have it."""
    host, begun, read = make_host(), threading.Event(), threading.Event()
    encode = host._encode_prompt
    seen = []

    def slowly(prompt: str):
        seen.append(prompt)
        begun.set()
        assert read.wait(60)
        return encode(prompt)

    monkeypatch.setattr(host, "_prompts", PromptDesk(slowly))
    session = host.open(photo(), prompt="calm")
    before = np.asarray(host.pipeline.text.k)
    session.set_prompt("slow")
    assert begun.wait(60)
    session.set_prompt("never mind")
    session.set_prompt("angry")
    blocks = []
    run(host, 1.5, lambda: blocks.extend(drain(session)))
    assert len(blocks) == 4
    np.testing.assert_array_equal(np.asarray(host.pipeline.text.k), before)
    saving = threading.Thread(target=host.save, args=(session, tmp_path / "session"))
    saving.start()
    saving.join(0.1)
    assert saving.is_alive()
    read.set()
    saving.join(60)
    assert seen == ["slow", "angry"]
    after = np.asarray(host.pipeline.text.k)
    assert (after != before).any()
    session.close()
    host.restore(tmp_path / "session")
    np.testing.assert_array_equal(np.asarray(host.pipeline.text.k), after)
    other = host.open(photo(), live=False)
    now = np.asarray(host.pipeline.text.k)
    other.set_prompt("joyful")  # not live: this has waited
    host.step()
    assert (np.asarray(host.pipeline.text.k) != now).any()


def test_nobody_waits_for_features(monkeypatch) -> None:
    """While a network listens, who speaks, ends or interrupts is not held up: that may be an event loop."""
    host = make_host()
    session = host.open(photo(), live=False)
    listening, go_on = threading.Event(), threading.Event()
    listen = session._hearing.listen

    def slowly() -> None:
        listening.set()
        assert go_on.wait(60)
        listen()

    monkeypatch.setattr(session._hearing, "listen", slowly)
    session.push_audio(speech(2))
    stepping = threading.Thread(target=host.step)
    stepping.start()
    assert listening.wait(60)

    def speak() -> None:
        session.push_audio(speech(0.5))
        session.end_of_speech()
        session.set_prompt(np.asarray(host._encode_prompt("angry")))
        session.interrupt()
        session.push_audio(speech(1, seed=1))

    speaking = threading.Thread(target=speak)
    speaking.start()
    speaking.join(30)
    waited = speaking.is_alive()
    go_on.set()
    stepping.join(60)
    speaking.join(60)
    assert not waited
    session.finish()
    sound = sound_of(list(session))
    assert sound[: FADE // 2].any()  # the block that was being heard fades, as if it had just left
    assert not sound[FADE:BLOCK].any()
    assert session.queued_seconds == 0
    said = speech(1, seed=1)
    first = np.flatnonzero(sound[FADE:])[0] + FADE
    np.testing.assert_array_equal(sound[first:][: len(said)], said)


def test_an_interrupt_reaches_blocks_on_their_way_and_no_other_session() -> None:
    def blocks(interrupt: bool) -> tuple[np.ndarray, np.ndarray]:
        host = make_host(STAGES)
        sessions = [host.open(photo(seed), seed=seed, live=False) for seed in range(2)]
        for session in sessions:
            session.push_audio(speech(6))
        for _ in range(4):
            host.step()
        if interrupt:
            assert sessions[0]._flying
            sessions[0].interrupt()
        for session in sessions:
            session.finish()
        return tuple(frames_of(list(session)) for session in sessions)

    went_on, other = blocks(False)
    stopped, undisturbed = blocks(True)
    np.testing.assert_array_equal(undisturbed, other)
    assert len(stopped) == 5 * 12  # four were fed, and the look-ahead of the last
    same = (stopped == went_on[: 5 * 12]).reshape(5, -1).all(axis=1)
    assert same.tolist() == [True, True, True, False, False]  # the fourth had a step to go


def test_save_and_restore_in_another_host(tmp_path) -> None:
    """Saved in the middle of speech, and gone on with elsewhere, next to others: not a bit differs."""
    samples = speech(7.4)
    whole_host = make_host(STAGES)
    whole = whole_host.open(photo(), prompt="hello", seed=5, live=False)
    whole.push_audio(samples)
    whole.finish()
    want = list(whole)
    host = make_host(STAGES)
    session = host.open(photo(), prompt="hello", seed=5, live=False)
    other = host.open(photo(1), seed=1, live=False)
    other.push_audio(speech(9, 1))
    session.push_audio(samples[: int(2.7 * BLOCK)])
    for _ in range(4):
        host.step()
    host.save(session, tmp_path / "session.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["session.safetensors"]
    assert (tmp_path / "session.safetensors").stat().st_mode & 0o777 == 0o600
    got = drain(session)
    assert 0 < len(got) < 7
    elsewhere = make_host(STAGES, name="elsewhere")
    elsewhere.open(photo(4), live=False).push_audio(speech(4))
    elsewhere.step()
    restored = elsewhere.restore(tmp_path / "session.safetensors", live=False)
    restored.push_audio(samples[int(2.7 * BLOCK) :])
    restored.finish()
    got += list(restored)
    assert [block.index for block in got] == list(range(8))
    np.testing.assert_array_equal(frames_of(got), frames_of(want))
    np.testing.assert_array_equal(sound_of(got), sound_of(want))
    session.push_audio(samples[int(2.7 * BLOCK) :])  # and where it was saved it goes on as well
    session.finish()
    rest = frames_of(list(session))
    np.testing.assert_array_equal(rest, frames_of(want)[-len(rest) :])


def test_a_session_that_was_told_its_end_ends_elsewhere_too(tmp_path) -> None:
    host = make_host()
    session = host.open(photo(), live=False)
    session.push_audio(speech(4))
    session.finish()
    host.step()
    host.save(session, tmp_path / "a.safetensors")
    got = drain(session)
    session.close()
    restored = host.restore(tmp_path / "a.safetensors", live=False)
    got += list(restored)
    assert restored.reason == "finished"
    assert [block.index for block in got] == list(range(len(got)))
    assert len(got) in (4, 5)


def test_a_session_of_another_model_changes_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name; and one whose arrays do not fit, whatever it says of itself."""
    host = make_host()
    session = host.open(photo())
    host.save(session, tmp_path / "a.safetensors")
    monkeypatch.setitem(vars(host), "_fingerprint", "another")
    with pytest.raises(UserError, match=r"was saved with .*weights"):
        host.restore(tmp_path / "a.safetensors")
    monkeypatch.undo()
    state = host.pipeline.save(session.slot)
    deeper = jax.tree.map(lambda x: np.concatenate([x, x[:, :1]], axis=1), state.rings)
    for rings in (deeper, jax.tree.map(lambda x: x[:, :-1], state.rings)):
        with pytest.raises(ValueError, match="of another model or size"):
            host.pipeline.load(SLOTS - 1, state._replace(rings=rings))
        assert host.pipeline.save(session.slot), "no change of it waits"


def test_a_saved_session_is_checked(tmp_path) -> None:
    host = make_host()
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="there is no saved session"):
        host.restore(path)
    sessions = [host.open(photo()) for _ in range(SLOTS)]
    host.save(sessions[0], path)
    with pytest.raises(Busy):
        host.restore(path)
    other = make_host(sampling=DROPPING)
    with pytest.raises(UserError, match="was saved with"):
        other.restore(path)
    path.write_bytes(path.read_bytes()[:-100])
    sessions[0].close()
    with pytest.raises(UserError, match="damaged"):
        host.restore(path)
    with pytest.raises(UserError, match="cannot be written"):
        host.save(host.open(photo()), tmp_path / "no" / "such.safetensors")


@pytest.mark.parametrize("fault", ["callback", "features", "prompt"])
def test_a_fault_closes_its_session_only(fault: str) -> None:
    def run_with(faulty: bool) -> np.ndarray:
        host = make_host(STAGES)
        good = host.open(photo(1), seed=1)
        bad = host.open(photo(2), on_block=(lambda block: 1 / 0) if fault == "callback" and faulty else None)
        blocks = []
        run(host, 1.0, lambda: blocks.extend(drain(good)))
        if faulty and fault == "features":
            bad._hearing.listen = None
        if faulty and fault == "prompt":
            bad.set_prompt(np.zeros((1, 3, 3, 3)))
        run(host, 3.0, lambda: blocks.extend(drain(good)))
        assert (bad.reason is not None) == faulty
        assert good.reason is None
        if faulty:
            assert bad.reason.startswith("failed: ")
            with pytest.raises(UserError, match="the session is closed"):
                bad.push_audio(speech(1))
            for _ in range(SLOTS - 1):  # its place is free
                host.open(photo(3))
        return frames_of(blocks)

    np.testing.assert_array_equal(run_with(True), run_with(False))
