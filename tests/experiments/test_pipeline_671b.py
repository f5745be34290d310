"""The 671B model's state on the report's 2048 GPUs takes what the planner says."""

import runpy
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "experiments" / "pipeline_671b" / "run.py"


def test_every_device_holds_the_planned_share_of_the_state():
    run = runpy.run_path(str(RUN))
    config = run["pipelined"]("dualpipe")
    held = run["bytes_per_device"](run["abstract_state"](config, run["abstract_mesh"]()))
    # A little more: norm gains of a few widths, router biases and the count of updates do not divide by 2048.
    assert held == pytest.approx(run["planned_bytes"](config), rel=1e-3)
