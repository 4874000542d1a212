"""One environment for every test: nine virtual CPU devices, full-precision products, no surprises.

Nine are four pipeline stages of two, and a decoder. They must be asked for before jax is imported, hence
the assignments above the imports.
"""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers and processes that tests start share what takes long to compile; a second run finds it there.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
# Most of the time goes into compiling, which all but the first flag shorten; given ones count more.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=9 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
) + os.environ.get("XLA_FLAGS", "")

from typing import Any

import hypothesis
import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

# A shell that runs the tests in the background ignores Ctrl-C for them and their children, some of which are
# tested for what they do then.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first example of a test compiles. Derandomised: a red run can be repeated.
hypothesis.settings.register_profile("lavatar", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("lavatar")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay together, for what is compiled once; so do all of the page, which share a
    browser and a server that wants to keep real time. (xdist's own groups do not work with pytest 9.2.)"""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "browser" if "tests/serving/browser/" in nodeid else nodeid.split("::")[0]

    return Together(config, log)


@pytest.fixture(autouse=True, scope="module")
def _forgotten_programs() -> Iterator[None]:
    """Linux maps at most 65530 pieces of memory into a process (`vm.max_map_count`), and every compiled
    program takes many: a worker that keeps those of all tests dies in the last ones."""
    yield
    pieces = Path("/proc/self/maps")
    if pieces.is_file() and len(pieces.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()
