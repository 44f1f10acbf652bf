"""Eight CPU devices for every test, and jaxtyping's shapes checked by beartype in all of the library."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
from jaxtyping import install_import_hook

# Tests compile much and run little, so they compile without optimising.
jax.config.update("jax_disable_most_optimizations", True)

install_import_hook(["dsv3_jax", "pallas_kernels"], "beartype.beartype")
