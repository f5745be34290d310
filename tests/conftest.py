"""Tests run on 8 emulated CPU devices; a test that wants one asks for a mesh of one."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
