"""SIGTERM is remembered, and does not end a run that saves."""

import os
import signal

from dsv3_jax.train.stop import Stop


def test_a_second_sigterm_does_not_end_a_run_that_saves_after_the_first():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)  # by default it ends the process
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_nobody_stopped_leaves_sigterm_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.requested()
    assert signal.getsignal(signal.SIGTERM) == before
