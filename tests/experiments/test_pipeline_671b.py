"""The 671B model's state on the report's 2048 GPUs takes what the planner says."""

import runpy
from pathlib import Path

from dsv3_jax.planner.cluster import plan_cluster
from dsv3_jax.planner.devices import load_device

RUN = Path(__file__).parents[2] / "experiments" / "pipeline_671b" / "run.py"


def test_every_device_holds_the_planned_share_of_the_state():
    run = runpy.run_path(str(RUN))
    config = run["pipelined"]("dualpipe")
    held = run["bytes_per_device"](run["abstract_state"](config, run["abstract_mesh"]()))
    planned = plan_cluster(config, load_device("h800"), run["SHAPE"], "dualpipe")
    assert {memory.optimizer for memory in planned.memory} == {held}
    # Weights and float32 gradients of whole layers: no less than the plan, which knows each rank's own.
    assert 6 * run["held_parameters"](config) > max(memory.weights + memory.gradients for memory in planned.memory)
