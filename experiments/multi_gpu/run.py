"""Expert exchange, training, pipelines and equality on all GPUs of one host, in one table.

python experiments/multi_gpu/run.py                         on 2, 4 or 8 GPUs
python experiments/multi_gpu/run.py --tiny --devices 4      on emulated CPU devices
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial

import jax
from common import Host, compile_steps
from exchange import measure_exchange, measure_layer, measure_links
from training import (
    check_equal,
    equality_configs,
    measure_pipelines,
    measure_training,
    pipeline_configs,
    training_configs,
)

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.schedule import KINDS

SECTIONS = ("links", "exchange", "layer", "pipeline", "training", "equal")


def main() -> None:
    """Prints what is measured, section by section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several = lambda *choices: partial(_several, choices)  # noqa: E731
    parser.add_argument("--sections", type=several(*SECTIONS), default=SECTIONS, help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--devices", type=int, help="of those there are; emulated on CPU")
    parser.add_argument("--precisions", type=several("bf16", "fp8"), default=("bf16", "fp8"))
    parser.add_argument("--streams", type=several(1, 2), default=(1, 2), help="microbatches side by side in training")
    parser.add_argument("--schedules", type=several(*KINDS), default=("1f1b", "zb1p", "dualpipev"))
    parser.add_argument("--pipe", type=several(2, 4, 8), help="ranks, such as 2,4; by default all devices")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="sizes for emulated CPU devices")
    args = parser.parse_args()
    if args.tiny:
        jax.config.update("jax_num_cpu_devices", args.devices or 8)
    host = host_of(args.devices, args.tiny)
    print(f"{host.devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    try:
        measure(host, args.sections, args)
    except ConfigError as error:
        sys.exit(str(error))


def _several(choices: tuple, text: str) -> list:
    """What is listed between commas, each one of the choices."""
    known = {str(choice): choice for choice in choices}
    if unknown := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"{text}: {unknown[0]!r} is not one of {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def measure(host: Host, sections: Sequence[str], args: argparse.Namespace) -> None:
    """All sections, those of whole steps last: their programs are compiled together, and nothing is timed meanwhile."""
    if {"links", "exchange"} & {*sections}:
        peak = measure_links(host)
        if "exchange" in sections:
            measure_exchange(host, peak)
    if "layer" in sections:
        measure_layer(host)
    configs = {
        "pipeline": lambda: pipeline_configs(host, args.schedules, args.pipe or [host.devices]),
        "training": lambda: training_configs(host, args.precisions, args.streams),
        "equal": lambda: equality_configs(host),
    }
    wanted = {section: make() for section, make in configs.items() if section in sections}
    started = time.perf_counter()
    programs = compile_steps({(section, *name): c for section, of in wanted.items() for name, c in of.items()})
    print(f"\n{len(programs)} steps compiled in {time.perf_counter() - started:.0f} s", flush=True)
    of = {section: {name[1:]: p for name, p in programs.items() if name[0] == section} for section in wanted}
    if "pipeline" in wanted:
        measure_pipelines(wanted["pipeline"], of["pipeline"], args.steps)
    if "training" in wanted:
        measure_training(host, wanted["training"], of["training"], args.steps)
    if "equal" in wanted:
        check_equal(wanted["equal"], of["equal"], args.steps)


def host_of(devices: int | None, tiny: bool) -> Host:
    """All devices, or so many. Exits with a sentence where there are too few."""
    there = len(jax.devices())
    if not tiny and jax.default_backend() != "gpu":
        sys.exit("needs NVIDIA GPUs; pass --tiny --devices 4 for emulated CPU devices")
    if (devices or there) > there or (devices or there) < 2:
        sys.exit(f"--devices {devices or there}: {there} are there; give 2, 4 or 8 of them")
    return Host(devices or there, tiny)


if __name__ == "__main__":
    os.environ.setdefault("NPROC", "16")  # threads of XLA: with few, emulated devices wait for each other
    main()
