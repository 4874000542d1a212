"""System programs that some tests run, and what to do when one is not there."""

import os
import shutil

import pytest


def need_program(program: str, package: str) -> None:
    """Without the program the calling test is skipped, except in CI, which installs it."""
    if shutil.which(program) is None:
        missing = f"{program} is not installed (Debian: apt-get install {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
