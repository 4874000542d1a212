"""Recordings for rendered faces, by free synthetic voices: `python tools/make_speech.py [--out runs/speech]`.

Deterministic; what exists is kept. Needs the programs espeak-ng, flite and festival (with its voice
cmu_us_slt_arctic_hts). Held-out voices and sentences are others than those of training.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import parse_options, run
from lavatar_jax.data.speech import write_corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeSpeech:
    """Write the recordings that the rendered faces speak."""

    out: Path = Path("runs/speech")
    """Folder for `train/` and `heldout/`."""
    train: int = 162
    """Recordings of 30 s for training."""
    heldout: int = 16
    """And for evaluation."""


def main(args: list[str]) -> None:
    options = parse_options(MakeSpeech, args, prog="tools/make_speech.py")
    for split in ("train", "heldout"):
        for count in track(range(1, getattr(options, split) + 1), description=f"{split} recordings"):
            write_corpus(options.out, split, count)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
