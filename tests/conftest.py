"""Tests run on 8 emulated CPU devices; a test that wants one asks for a mesh of one.

Most of their time is compilation, of programs that run for a moment, and starting Python. LLVM is told not to optimize
(XLA's own passes run as ever), fusions are emitted in XLA's older way, which compiles faster, and what one process of
the session has compiled, the others read: programs, and bytecode where the environment keeps none. The settings are in
the environment, for the processes that tests start.
"""

import gc
import os
import sys
import tempfile

import jax

FIRST = ("slurm/", "launch/test_run", "train/test_resume", "notebooks/", "experiments/")

os.environ.setdefault("NPROC", "16")  # threads of XLA: with few, kernels in interpret mode wait for each other forever
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "xla_backend_extra_options" not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters".strip()
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
jax.config.update("jax_num_cpu_devices", 8)
gc.set_threshold(50_000)  # tracing makes many objects that stay: with 700, every tenth second goes to looking at them


def pytest_configure(config):
    """Before xdist starts its workers, which inherit the folder."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="dsv3-tests-")
        config.add_cleanup(folder.cleanup)
        share_compiled(folder.name)


def share_compiled(folder):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(folder, "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = os.path.join(folder, "bytecode")
        sys.dont_write_bytecode = False


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one when the others are done."""
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if name in item.nodeid), len(FIRST)))
