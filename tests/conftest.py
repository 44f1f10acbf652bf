"""Eight CPU devices for every test, jaxtyping's shapes checked by beartype in all of the library, and what makes many processes quick."""

import gc
import os
import sys
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # the first process; the others, and the commands that tests launch, inherit this
    _shared = tempfile.TemporaryDirectory(prefix="dsv3_jax_tests_")
    # Compiled programs are shared between tests; a folder given from outside keeps them between test runs.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{_shared.name}/programs")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or the first worker takes most of a GPU's memory from the others
    os.environ |= {
        # Tests compile much and run little, so they compile without optimising.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # A launched command would spend seconds on compiling JAX's own source where no bytecode may be written beside it.
        "PYTHONPYCACHEPREFIX": f"{_shared.name}/bytecode",
        "PYTHONDONTWRITEBYTECODE": "",
        # What commands set by starting again (experiments/cli.py), which takes 0.2 s of each.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    # Of what this process compiles too, which is JAX: Python read the two variables before they were set.
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["PYTHONPYCACHEPREFIX"], False
    if "slow" not in sys.argv:  # slow tests compile as users do
        # By XLA's former emitter of fusions in half the time; and not in up to 32 parts, which would be for more processors.
        faster = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {faster}".strip()

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)  # of this process; a launched command has the devices of the machine
# A device takes 32 computations at once. The GPU interpreter runs its own from inside a kernel, and would wait for ever for
# a place among those that were sent after the kernel and wait for it.
jax.config.update("jax_cpu_enable_async_dispatch", False)
install_import_hook(["dsv3_jax", "pallas_kernels"], "beartype.beartype")
gc.set_threshold(100_000, 20, 20)  # tracing makes many objects that live on: to look for garbage among them took 8 % of the time

LONGEST = ("training/test_resume.py", "test_notebooks.py", "test_ablations.py", "interop/test_commands.py", "training/test_step.py")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
