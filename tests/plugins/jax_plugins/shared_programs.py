"""Processes of one run compile a program once: process 0 does, the others read it from the cache.

jax loads this in the processes that tests start, see conftest.py. On CPU its cache does not do this by itself: the key
contains a fingerprint that differs between processes, and only process 0 writes.
"""

import time

from jax._src import cache_key, compilation_cache, distributed

_MOST_SECONDS = 120


def initialize() -> None:
    """Called by jax when it looks for its plugins."""
    cache_key._hash_accelerator_config = cache_key._hash_devices
    read = compilation_cache.get_executable_and_time

    def read_or_wait(key, compile_options, backend, devices, *rest):
        deadline = time.monotonic() + _MOST_SECONDS
        while True:
            try:
                found = read(key, compile_options, backend, devices, *rest)
            except Exception:
                # It is only half written.
                found = None, None
            if found[0] is not None or not _comes_from_process_0(devices) or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    compilation_cache.get_executable_and_time = read_or_wait


def _comes_from_process_0(devices) -> bool:
    """Whether it compiles this too, and is another."""
    return distributed.global_state.process_id != 0 and len({device.process_index for device in devices}) > 1
