"""Speed and memory of a conversion: `python tools/bench_convert.py` (needs 5 GB of disk).

Writes a folder of 2 GiB in the published layout and converts it, each way in a process of its own. The
transformer has one layer of the published width, so its tensors are as large as the real ones, and random
numbers. The peak of resident memory is compared with the bound: twice the largest tensor plus 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_dtypes
import numpy as np

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.checkpoints.exporting import (
    LORA,
    Parameter,
    speech_settings,
    tensors_of,
    write_json,
    write_safetensors,
    write_shards,
)  # fmt: skip
from lavatar_jax.checkpoints.exporting import Tensor as PyTorchTensor
from lavatar_jax.checkpoints.published import FILES, RULES, SPEECH, TOKENIZER, dit_settings, make_component
from lavatar_jax.cli import run
from lavatar_jax.config import DiTConfig, VAEConfig
from lavatar_jax.models.umt5 import UMT5Config
from lavatar_jax.models.wav2vec2 import Wav2Vec2Config

CONFIGS: dict[str, Any] = {
    "dit": DiTConfig(layers=1, inject_layers=(0,), audio_layers=2),
    "vae": VAEConfig(width=48),
    "text": UMT5Config(vocabulary=16_384, ffn_width=2048, layers=1),
    "speech": Wav2Vec2Config(layers=1),
}
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
WAYS = {"bf16": [], "bf16 + LoRA": ["--lora"], "fp8 + LoRA": ["--dtype", "fp8", "--lora"]}
RANK = 128
GIB = 2**30


def random_tensors(component: str) -> list[PyTorchTensor]:
    """The tensors of a component under their PyTorch names; numbers are drawn when they are written."""
    rng = np.random.default_rng(0)
    dtype = BFLOAT16 if component in ("dit", "text") else FLOAT32
    model = jax.eval_shape(lambda: make_component(component, CONFIGS[component]))

    def parameter(path: str, shape: tuple[int, ...]) -> Parameter:
        def read(layer: int | None) -> np.ndarray:
            size = shape if layer is None else shape[1:]
            return (0.02 * rng.standard_normal(size, np.float32)).astype(dtype)

        return Parameter(path, shape, dtype, read)

    parameters = [parameter(path, leaf.shape) for path, leaf in param_paths(model).items()]
    return list(tensors_of(parameters, RULES[component]))


def adapters(tensors: list[PyTorchTensor]) -> list[PyTorchTensor]:
    """A LoRA of the layers that the released one has."""
    rng = np.random.default_rng(1)

    def matrix(key: str, shape: tuple[int, ...]) -> PyTorchTensor:
        return PyTorchTensor(key, shape, FLOAT32, lambda: 0.02 * rng.standard_normal(shape, np.float32))

    found = []
    for tensor in tensors:
        module = tensor.key.removesuffix(".weight")
        if module.endswith((".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")) and len(tensor.shape) == 2:
            name = f"base_model.model.{module}"
            found.append(matrix(f"{name}.lora_A.default.weight", (RANK, tensor.shape[1])))
            found.append(matrix(f"{name}.lora_B.default.weight", (tensor.shape[0], RANK)))
    return found


def write_source(folder: Path) -> tuple[int, int]:
    """The published files -> bytes of all tensors, and of the largest."""
    everything = {component: random_tensors(component) for component in CONFIGS}
    for path in (TOKENIZER, SPEECH):
        (folder / path).mkdir(parents=True)
    write_shards(folder, everything["dit"], GIB)
    write_safetensors(folder / LORA, adapters(everything["dit"]))
    write_safetensors(folder / FILES["speech"][0], everything["speech"])
    for component in ("vae", "text"):
        write_pth(folder / FILES[component][0], everything[component])
    write_json(folder / "config.json", dit_settings(CONFIGS["dit"]))
    write_json(folder / SPEECH / "config.json", speech_settings(CONFIGS["speech"]))
    (folder / TOKENIZER / "tokenizer.json").write_text("{}")
    sizes = [tensor.nbytes for tensors in everything.values() for tensor in tensors]
    return sum(sizes), max(sizes)


def write_pth(path: Path, tensors: list[PyTorchTensor]) -> None:
    """With torch.save; as safetensors where torch is not installed."""
    try:
        import torch
    except ImportError:
        write_safetensors(path.with_suffix(".safetensors"), tensors)
        return

    def to_torch(x: np.ndarray) -> Any:
        x = np.ascontiguousarray(x)
        return (
            torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
            if x.dtype == BFLOAT16
            else torch.from_numpy(x)
        )

    torch.save({tensor.key: to_torch(tensor.read()) for tensor in tensors}, path)


def convert(options: list[str]) -> dict[str, float]:
    """Converts in a fresh process -> seconds and the peak of its memory."""
    command = [sys.executable, __file__, "--child", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(options: list[str]) -> None:
    from tools.convert import main as convert_main

    start = time.perf_counter()
    convert_main(options)
    # Not ru_maxrss: a process inherits that from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, out = Path(name) / "published", Path(name) / "out"
        total, largest = write_source(source)
        bound = 2 * largest + GIB
        print(
            f"{total / GIB:.2f} GiB, largest tensor {largest / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB"
        )
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print("| | seconds | MB/s | peak memory | bound |\n|---|---|---|---|---|")
        within = True
        for way, extra in WAYS.items():
            lora = [str(source / LORA)] if "--lora" in extra else []
            found = convert(["--wan", str(source), "--out", str(out), *extra, *lora])
            shutil.rmtree(out)
            seconds, peak = found["seconds"], found["peak"]
            within = within and peak < bound
            cells = f"{seconds:.1f} | {total / seconds / 1e6:.0f}"
            print(f"| {way} | {cells} | {peak / 2**20:.0f} MiB | {bound / 2**20:.0f} MiB |", flush=True)
    sys.exit(0 if within else "the bound was exceeded")


if __name__ == "__main__":
    sys.exit(run(lambda: child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()))
