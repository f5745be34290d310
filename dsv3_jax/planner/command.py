"""What `dsv3 plan` does for a cluster."""

import math
from pathlib import Path

from rich.console import Console

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.planner import search as searching
from dsv3_jax.planner.cluster import parse_mesh, plan_cluster
from dsv3_jax.planner.cluster_report import print_cluster_plan
from dsv3_jax.planner.devices import load_device
from dsv3_jax.planner.report import mesh_of, plan, print_model
from dsv3_jax.planner.search import print_search


def run(
    config: Config,
    mesh: str | None = None,
    device: str | None = None,
    schedule: str | None = None,
    timeline: str | None = None,
    search: bool = False,
) -> None:
    """Prints the plan of a run on a cluster, draws its timeline, or searches for better ones.

    Raises:
        ConfigError: the options, the mesh and the configuration do not fit together; or nothing is found that fits the
            devices.
    """
    console = Console()
    gpu, sizes = load_device(device or "h800"), _mesh(config, mesh)
    if search:
        print_search(searching.search(config, gpu, math.prod(sizes.values())), console)
        return
    if timeline:
        _require_png(timeline)
    own = config.parallel.schedule if config.parallel.pipe > 1 else None
    planned = plan_cluster(config, gpu, sizes, schedule or own)
    print_model(config, plan(config), console)
    print_cluster_plan(planned, console)
    if timeline:
        from dsv3_jax.planner.pictures import save_timeline  # matplotlib takes seconds to import

        save_timeline(planned.timeline, Path(timeline))
        console.print(f"timeline drawn to {timeline}")


def _mesh(config: Config, text: str | None) -> dict[str, int]:
    """The mesh of the option, or of the configuration."""
    if text is not None:
        return parse_mesh(text)
    known = mesh_of(config.parallel)
    if known is None:
        raise ConfigError(
            "dsv3 plan: the config leaves the number of devices open; pass --mesh pipe=16,data=2,node=8,gpu=8"
        )
    return known


def _require_png(path: str) -> None:
    if not path.endswith(".png"):
        raise ConfigError(f"--timeline {path}: give a file that ends in .png")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--timeline {path}: there is no such folder; make it first")
