"""Expert exchange, training, pipelines and equality on all GPUs of one host, in one table.

python experiments/multi_gpu/run.py                         on 2, 4 or 8 GPUs
python experiments/multi_gpu/run.py --tiny --devices 4      on emulated CPU devices
"""

import argparse
import os
import sys
import time

import jax
from common import Host
from exchange import measure_exchange, measure_layer, measure_links
from training import check_equal, measure_pipelines, measure_training

SECTIONS = ("links", "exchange", "layer", "equal", "training", "pipeline")


def main() -> None:
    """Prints what is measured, section by section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--devices", type=int, help="of those there are; emulated on CPU")
    parser.add_argument("--precisions", default="bf16,fp8")
    parser.add_argument("--schedules", default="1f1b,zb1p,dualpipev")
    parser.add_argument("--pipe", default=None, help="ranks, such as 2,4; by default all devices")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="sizes for emulated CPU devices")
    args = parser.parse_args()
    sections = args.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--sections {args.sections}: {min(unknown)!r} is not one of {', '.join(SECTIONS)}")
    if args.tiny:
        jax.config.update("jax_num_cpu_devices", args.devices or 8)
    host = host_of(args.devices, args.tiny)
    print(f"{host.devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    peak = measure_links(host) if {"links", "exchange"} & {*sections} else None
    ranks = [int(size) for size in args.pipe.split(",")] if args.pipe else [host.devices]
    actions = {
        "exchange": lambda: measure_exchange(host, peak),
        "layer": lambda: measure_layer(host),
        "equal": lambda: check_equal(host, args.steps),
        "training": lambda: measure_training(host, args.precisions.split(","), args.steps),
        "pipeline": lambda: [measure_pipelines(host, args.schedules.split(","), r, args.steps) for r in ranks],
    }
    for name in sections:
        started = time.perf_counter()
        actions.get(name, lambda: None)()
        print(f"\n({name}: {time.perf_counter() - started:.0f} s)", flush=True)


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
