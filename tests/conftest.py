"""One environment for every test: nine virtual CPU devices, full-precision products, no surprises.

Nine are four pipeline stages of two, and a decoder. They must be asked for before jax is imported, hence
the assignments above the imports.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=9"

import hypothesis
import jax

jax.config.update("jax_default_matmul_precision", "highest")

# No deadline: the first example of a test compiles. Derandomised: a red run can be repeated.
hypothesis.settings.register_profile("lavatar", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("lavatar")
