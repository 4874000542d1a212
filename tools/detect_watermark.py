"""Says whether a video carries the watermark: found or not, the score, the probability of a false alarm.

    python tools/detect_watermark.py VIDEO [--key-file FILE]

Exit code 0 if it is found, 1 if not, 2 if the input is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lavatar_jax.cli import parse_options, run
from lavatar_jax.errors import UserError
from lavatar_jax.inference.video import read_frames
from lavatar_jax.serving.watermark import PUBLIC_KEY, Watermark


@dataclass(frozen=True, kw_only=True)
class Detect:
    """Says whether a video carries the watermark."""

    video: tyro.conf.Positional[Path]
    key_file: Path | None = None
    """File whose bytes are the key; without it, the public key."""


def read_key(path: Path | None) -> bytes:
    """Raises UserError. A file, because a command line can be read by everybody on the machine."""
    try:
        key = PUBLIC_KEY if path is None else path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the file of the key") from None
    if not key:
        raise UserError(f"{path} is empty; give the file of the key")
    return key


def main(args: list[str]) -> None:
    options = parse_options(Detect, args, prog="tools/detect_watermark.py")
    detection = Watermark(key=read_key(options.key_file)).detect(read_frames(options.video))
    found = "found" if detection.present else "not found"
    print(f"watermark {found}: score {detection.score:.1f}, false alarm at most {detection.false_alarm:.1g}")
    if not detection.present:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
