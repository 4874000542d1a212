"""How long a start takes: from a converted checkpoint to the first frame, phase by phase.

    python tools/bench_cold_start.py [--model DIR] [--size 128x128] [--json FILE]

Without a model, a small checkpoint with the published layout is written and converted first (needs torch).
Each row is a process of its own: without jax's persistent compilation cache, with an empty one, and with the
one that the row before has filled. Seconds of tracing and compiling are those that jax reports for a phase.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lavatar_jax.errors import UserError
from lavatar_jax.files import write_text
from lavatar_jax.inference.output import check_output

PHASES = ("import", "prompt", "restore", "photo", "sound", "first block", "second block")
COMPILING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


def measure(model: str, size: str | None) -> dict[str, tuple[float, float]]:
    """{phase: (seconds, of which tracing and compiling)} of this process, which must be a fresh one."""
    import jax
    import jax.monitoring
    import numpy as np

    from lavatar_jax.checkpoints.store import load_config, load_model_folder, model_folder
    from lavatar_jax.inference.listen import listen
    from lavatar_jax.inference.rollout import rollout
    from lavatar_jax.inference.talk import photo_conditions, read_prompt
    from lavatar_jax.types import BlockInput

    compiling = 0.0

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal compiling
        if event.endswith(COMPILING):
            compiling += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
    times: dict[str, tuple[float, float]] = {}
    last, before = START, 0.0

    def phase(name: str, *results: object) -> None:
        nonlocal last, before
        jax.block_until_ready(results)
        now = time.perf_counter()
        times[name] = now - last, compiling - before
        last, before = now, compiling

    jax.devices()
    phase("import")
    folder = model_folder(model)
    config = load_config(folder)
    prompt = read_prompt(folder, config, "a person talking")
    phase("prompt", prompt)
    avatar = load_model_folder(folder)
    if avatar.config.sampling.decode != "stream":
        raise UserError(f"{model} decodes whole clips: its first frames come after several blocks")
    phase("restore", avatar.dit, avatar.vae, avatar.speech)
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (512, 512, 3), dtype=np.uint8)
    sides = tuple(int(side) for side in size.split("x")) if size else None
    image_size = (sides[0], sides[1]) if sides else None
    conditions = photo_conditions(avatar, image, prompt, image_size=image_size)
    phase("photo", conditions)
    sound = (0.1 * generator.standard_normal(3 * 16_000)).astype(np.float32)
    features = [jax.numpy.asarray(f[None, None]) for f in listen(avatar, sound, config.sampling)]
    phase("sound", features)
    blocks = rollout(avatar.dit, avatar.vae, conditions, map(BlockInput, features), config.sampling)
    for name in PHASES[-2:]:
        block = next(blocks)
        phase(name, block.frames)
    return times


def start(model: str, size: str | None, cache: str | None) -> dict[str, tuple[float, float]]:
    """Measures in a fresh process, with the compilation cache in this folder (None: without)."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true" if cache else "false"}
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    arguments = [sys.executable, __file__, "--child", "--model", model, *(["--size", size] if size else [])]
    done = subprocess.run(arguments, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the measured process failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def convert_small(folder: Path) -> Path:
    """A model folder in `folder` that has gone the way of the published one: bf16, LoRA merged."""
    from lavatar_jax.checkpoints.conversion import Task, convert_folder
    from tests.published import write_published
    from tools.pth import PickledTensors

    made = write_published(folder)
    convert_folder(Task(wan=made.wan, lora=made.lora, out=folder / "model"), PickledTensors)
    return folder / "model"


def table(rows: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Markdown; the first frame is there after the first block."""
    lines = [f"| compilation cache | {' | '.join(PHASES)} | first frame |", "|---" * (len(PHASES) + 2) + "|"]
    for name, times in rows.items():
        cells = [f"{times[p][0]:.2f} ({times[p][1]:.2f})" for p in PHASES]
        until = [times[p] for p in PHASES[:-1]]
        cells.append(f"**{sum(t for t, _ in until):.2f}** ({sum(c for _, c in until):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="shipped model or model folder")
    parser.add_argument("--size", help="largest video, e.g. 128x128 (default: the model's)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json:
        check_output(arguments.json, ".json")
    if arguments.child:
        print(json.dumps(measure(arguments.model, arguments.size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, size = arguments.model, arguments.size
        if not model:
            model, size = str(convert_small(Path(folder))), size or "128x128"
        cache = f"{folder}/cache"
        rows = {"off": start(model, size, None)}
        rows |= {name: start(model, size, cache) for name in ("empty", "filled")}
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, {datetime.date.today()}")
    print("Seconds, in brackets those of tracing and compiling:")
    print(table(rows))
    if arguments.json:
        write_text(arguments.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    if "--child" in sys.argv:  # whose imports are measured
        main()
    else:
        from lavatar_jax.cli import run

        sys.exit(run(main))
