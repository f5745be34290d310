"""Tests run on 8 emulated CPU devices; a test that wants one asks for a mesh of one."""

import os

import jax

os.environ.setdefault("NPROC", "16")  # threads of XLA: with few, kernels in interpret mode wait for each other forever
jax.config.update("jax_num_cpu_devices", 8)
