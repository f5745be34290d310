"""Tests run on 8 emulated CPU devices; a test that wants one asks for a mesh of one.

Most of their time is compilation, of programs that run for a moment: LLVM is told not to optimize, here and in the
processes that tests start. XLA's own passes run as ever.
"""

import os

import jax

os.environ.setdefault("NPROC", "16")  # threads of XLA: with few, kernels in interpret mode wait for each other forever
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
jax.config.update("jax_num_cpu_devices", 8)
