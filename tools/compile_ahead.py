"""Compile everything that a served model needs, so that a start of the server compiles nothing.

    python tools/compile_ahead.py --slots 2                # for serve.py live --sessions 2
    python tools/compile_ahead.py --slots 2 --check        # exit code 1 if a start would compile
    python tools/compile_ahead.py --model DIR --stages 4   # for serve.py live --model DIR --devices 5

Programs depend on shapes, layout, devices and the version of jax, so give the server's numbers; without
--sessions the small model's server takes two on two cores, others one. A session is made,
speaks for some seconds, is saved and restored: what a server runs. JAX_COMPILATION_CACHE_DIR sets another
folder than the default.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", default="tiny", help="shipped model or model folder")
    add("--stages", type=int, help="stages of the pipeline, with a device each (default: all on one device)")
    add("--shared-decoder", action="store_true", help="the decoder shares the last stage's device")
    add("--slots", type=int, default=1, help="sessions at once")
    add("--size", help="HEIGHTxWIDTH pixels, not as --size of generate (default: the model's)")
    add("--devices", type=int, help="make so many virtual devices (CPU only)")
    add("--check", action="store_true", help="write nothing; exit code 1 if a start would compile something")
    return result


if __name__ == "__main__":
    OPTIONS = parser().parse_args()
    if OPTIONS.devices:  # jax reads it when it is imported
        flag = f"--xla_force_host_platform_device_count={OPTIONS.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    from lavatar_jax.cli import configure_jax

    configure_jax()
    # Programs that compile fast are kept too: there are hundreds. In a check nothing is.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9" if OPTIONS.check else "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jax.monitoring
import numpy as np

from lavatar_jax.checkpoints.store import load_config, load_model_folder, model_folder
from lavatar_jax.cli import run
from lavatar_jax.errors import UserError
from lavatar_jax.inference.prompt_reader import PromptReader
from lavatar_jax.inference.session_host import SessionHost
from lavatar_jax.inference.sound import SAMPLE_RATE
from lavatar_jax.parallel import PipelineLayout


class Compilations:
    """Listens to jax: which programs were compiled, and which came from the cache."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, float]] = []
        self.found = 0
        self._hit = False
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_event(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._hit = True  # of the program whose duration is reported next

    def _on_duration(self, event: str, duration_secs: float, **details: Any) -> None:
        if event != "/jax/core/compile/backend_compile_duration":
            return
        if self._hit:
            self.found += 1
        else:
            self.compiled.append((str(details.get("fun_name", "?")), duration_secs))
        self._hit = False


def serve_once(
    model: str, layout: PipelineLayout | None, slots: int, size: tuple[int, int] | None
) -> dict[str, float]:
    """What a server does with a model, from loading it to a restored session. Seconds since the start."""
    folder = model_folder(model)
    config = load_config(folder)
    encode = None if config.text is None else PromptReader(folder, config)
    avatar = load_model_folder(folder)
    times = {"loaded": time.perf_counter() - START}
    host = SessionHost(avatar, slots=slots, layout=layout, size=size, encode_prompt=encode)
    generator = np.random.default_rng(0)
    photo = generator.integers(0, 255, (*host.size, 3), dtype=np.uint8)
    session = host.open(photo, prompt="a person talking", live=False)
    config = avatar.config
    block = config.dit.block_frames * avatar.vae.config.temporal_factor / config.fps
    # Until the adaptive sink has come and the pipeline is full, and a little longer.
    blocks = (config.sampling.adapt_sink_after or 0) + host.pipeline.layout.stages + 3
    sound = 0.3 * generator.standard_normal(int(blocks * block * SAMPLE_RATE))
    for number in range(blocks):
        session.push_audio(sound[number * len(sound) // blocks :][: len(sound) // blocks].astype(np.float32))
        if session.read(timeout=0) is not None:
            times.setdefault("first frames", time.perf_counter() - START)
    session.end_of_speech()
    with tempfile.TemporaryDirectory() as place:
        host.save(session, Path(place) / "session")
        session.close()
        restored = host.restore(Path(place) / "session", live=False)
    restored.push_audio(sound[: len(sound) // blocks].astype(np.float32))
    restored.finish()
    for _ in restored:
        times.setdefault("first frames", time.perf_counter() - START)
    host.close()
    return times | {"all": time.perf_counter() - START}


def main(options: argparse.Namespace) -> int:
    layout = None
    if options.stages:
        layout = PipelineLayout(stages=options.stages, own_decoder=not options.shared_decoder)
    size = None
    if options.size:
        sides = options.size.split("x")
        if len(sides) != 2 or not all(side.isdigit() for side in sides):
            raise UserError(f"--size {options.size}: expected HEIGHTxWIDTH, as 704x384")
        size = int(sides[0]), int(sides[1])
    compilations = Compilations()
    times = serve_once(options.model, layout, options.slots, size)
    for name, seconds in sorted(compilations.compiled, key=lambda item: -item[1])[:12]:
        print(f"  {seconds:7.2f} s  {name}")
    if len(compilations.compiled) > 12:
        rest = sum(seconds for _, seconds in sorted(compilations.compiled, key=lambda item: -item[1])[12:])
        print(f"  {rest:7.2f} s  {len(compilations.compiled) - 12} smaller ones")
    total, count = sum(seconds for _, seconds in compilations.compiled), len(compilations.compiled)
    print(f"compiled {count} programs in {total:.1f} s, found {compilations.found} in the cache")
    print("seconds since the start: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items()))
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    held = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
    print(f"cache: {folder}, {len(held)} files, {sum(held) / 1e6:.0f} MB")
    if options.check:
        print(
            "a start compiles "
            + (f"{len(compilations.compiled)} programs" if compilations.compiled else "nothing")
        )
        return int(bool(compilations.compiled))
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(OPTIONS)))
