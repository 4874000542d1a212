"""How far a rollout in bfloat16 and in 8 bits moves away from the same rollout in float32, block by block.

    python tools/drift_precision.py [--blocks 40] [--width 384] [--layers 8] [--json FILE] [--plot FILE.png]

The network has random weights, every one of them a bfloat16 number, so that only the arithmetic differs
between the runs; noise, sound and positions are the same. Printed is ||x - x32|| / ||x32|| of the denoised
latents of a block. The ring of keys, the adapted sink and the noise levels are those of the released
pipeline, so an error of one block is seen by the next ones. "other noise" is float32 with another seed: how
far apart unrelated videos are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.checkpoints.convert import param_paths
from lavatar_jax.cli import run
from lavatar_jax.config import RELEASE_TPP, DiTConfig, VAEConfig
from lavatar_jax.files import replacing, write_text
from lavatar_jax.inference.rollout import rollout
from lavatar_jax.models.dit import CausalDiT
from lavatar_jax.models.vae import CausalVAE, make_vae
from lavatar_jax.quant import quantize
from lavatar_jax.types import BlockInput, Conditions

Model = Any
COLOURS = ("#1f77b4", "#d62728", "#ff7f0e", "#999999")


def random_model(make: Callable[[], Model], seed: int) -> Model:
    """Random numbers in every parameter, also in those that training starts at zero; values of bfloat16.

    Matrices keep the size of what they multiply, norms are near 1, biases and tables are small.
    """
    abstract = jax.eval_shape(make)
    generator = np.random.default_rng(seed)

    def fill(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        shape = leaf.shape[1:] if path.startswith(("blocks.", "injectors.")) else leaf.shape
        x = generator.normal(size=leaf.shape)
        if len(shape) > 1:
            x /= math.sqrt(math.prod(shape[:-1]))
        else:
            x = 0.02 * x + path.endswith((".weight", ".gamma"))
        return jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)

    leaves = [fill(path, leaf) for path, leaf in param_paths(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def configurations(width: int, layers: int) -> tuple[DiTConfig, VAEConfig]:
    """A small transformer with everything the published one has, and a decoder that costs nothing."""
    dit = DiTConfig(
        layers=layers,
        width=width,
        heads=width // 64,
        ffn_width=width * 27 // 10 // 16 * 16,
        text_dim=64,
        text_len=32,
        audio_dim=32,
        audio_layers=3,
        inject_layers=tuple(range(0, layers, 3)),
    )
    vae = VAEConfig(
        kind="wan22", width=4, multipliers=(1, 2, 2), res_blocks=1, temporal_downsample=(True, True)
    )
    return dit, vae


def latents(dit: CausalDiT, vae: CausalVAE, size: int, blocks: int, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Denoised latents [1, F, H, W, C] block after block; the conditions do not depend on `seed`."""
    config, generator = dit.config, np.random.default_rng(1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    picture = (size, size, config.latent_channels)
    conditions = Conditions(
        text=normal(1, config.text_len, config.text_dim),
        reference=normal(1, 1, *picture),
        motion=normal(1, config.motion_frames[1], *picture),
        still=normal(1, RELEASE_TPP.prime_latents, *picture),
    )
    frames = 4 * config.block_frames
    sound = (BlockInput(normal(1, 1, config.audio_layers, config.audio_dim, frames)) for _ in range(blocks))
    for block in rollout(dit, vae, conditions, sound, RELEASE_TPP, seed=seed):
        yield np.asarray(block.latent, np.float64)


def half(model: CausalDiT) -> CausalDiT:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)


def measure(width: int, layers: int, size: int, blocks: int) -> dict[str, list[float]]:
    """Relative error per block of each way to compute."""
    dit_config, vae_config = configurations(width, layers)
    dit = random_model(lambda: CausalDiT(dit_config, rngs=nnx.Rngs(0)), 0)
    vae = random_model(lambda: make_vae(vae_config, rngs=nnx.Rngs(0)), 1)
    ways: dict[str, tuple[Callable[[CausalDiT], CausalDiT], int]] = {
        "bf16": (half, 0),
        "fp8, one scale a layer": (lambda dit: quantize(half(dit)), 0),
        "fp8, a scale per output": (lambda dit: quantize(half(dit), per_channel=True), 0),
        "float32, other noise": (lambda dit: dit, 1),
    }
    start = time.perf_counter()
    want = list(latents(dit, vae, size, blocks))
    print(f"float32: {time.perf_counter() - start:.0f} s", flush=True)
    errors: dict[str, list[float]] = {}
    for name, (change, seed) in ways.items():
        start = time.perf_counter()
        got = latents(change(dit), vae, size, blocks, seed=seed)
        errors[name] = [
            float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(got, want, strict=True)
        ]
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return errors


def table(errors: dict[str, list[float]]) -> str:
    """Markdown, with means over quarters of the rollout behind the first block."""
    blocks = len(next(iter(errors.values())))
    quarters = [part for part in np.array_split(np.arange(blocks), 4) if len(part)]
    names = ["block 0", *(f"blocks {part[0]}-{part[-1]}" for part in quarters), "largest"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, values in errors.items():
        means = [float(np.mean([values[i] for i in part])) for part in quarters]
        numbers = " | ".join(f"{x:.4f}" for x in (values[0], *means, max(values)))
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


def plot(errors: dict[str, list[float]], path: Path) -> None:
    """Error over block number, logarithmic."""
    width, height, left, top, right, bottom = 900, 480, 80, 30, 20, 60
    font = ImageFont.load_default(size=15)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    low = math.floor(math.log10(min(map(min, errors.values()))))
    high = math.ceil(math.log10(max(map(max, errors.values()))))
    blocks = len(next(iter(errors.values())))

    def place(block: float, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * block / max(blocks - 1, 1)
        y = top + (height - top - bottom) * (high - math.log10(value)) / (high - low)
        return x, y

    for power in range(low, high + 1):
        for digit in (1, 2, 5) if power < high else (1,):
            y = place(0, digit * 10.0**power)[1]
            pen.line([(left, y), (width - right, y)], fill="#bbbbbb" if digit == 1 else "#eeeeee")
            pen.text((left - 8, y), f"{digit * 10.0**power:g}", fill="black", font=font, anchor="rm")
    for block in range(0, blocks, 5):
        x, y = place(block, 10.0**low)
        pen.text((x, y + 6), str(block), fill="black", font=font, anchor="mt")
    pen.text((left + (width - left - right) / 2, height - 24), "block", fill="black", font=font, anchor="mt")
    pen.text((left, 6), "relative error of the denoised latents against float32", fill="black", font=font)
    for colour, (name, values) in zip(COLOURS, errors.items(), strict=False):
        points = [place(block, value) for block, value in enumerate(values)]
        pen.line(points, fill=colour, width=3)
        above = points[-1][1] - 8 if name != "fp8, a scale per output" else points[-1][1] + 24
        pen.text((points[-1][0] - 4, above), name, fill=colour, font=font, anchor="rb")
    with replacing(path) as part:
        image.save(part, "PNG")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--blocks", type=int, default=40, help="of 12 frames")
    add("--width", type=int, default=384, help="of the transformer, a multiple of 64")
    add("--layers", type=int, default=8)
    add("--size", type=int, default=16, help="rows and columns of the latent, a multiple of 8")
    add("--json", type=Path, help="also write the numbers there")
    add("--plot", type=Path, help="also draw them there (PNG)")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    errors = measure(arguments.width, arguments.layers, arguments.size, arguments.blocks)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    print(table(errors))
    if arguments.json:
        write_text(arguments.json, json.dumps(errors, indent=1) + "\n")
    if arguments.plot:
        plot(errors, arguments.plot)


if __name__ == "__main__":
    sys.exit(run(main))
