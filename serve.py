"""Avatars from the command line: `python serve.py generate --help`, `python serve.py live`."""

import signal
import sys

from lavatar_jax.cli import configure_jax, parse, run
from lavatar_jax.inference.generate import Generate
from lavatar_jax.serving.live import Live
from lavatar_jax.serving.livekit_worker import LiveKit

COMMANDS = {"generate": Generate, "live": Live, "livekit": LiveKit}


def main(args: list[str]) -> None:
    parse(COMMANDS, args, prog="serve.py", description="A talking avatar from one photo and speech.").run()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped is as good as Ctrl-C
    configure_jax()
    sys.exit(run(lambda: main(sys.argv[1:])))
