"""The command line: `dsv3 train | launch | generate | plan | convert`.

Nothing heavy is imported before it is needed, so that `dsv3 --help` answers at once.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import itertools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.launch.command import add_launchers, launch
from dsv3_jax.launch.training import LaunchError, Training

if TYPE_CHECKING:
    from dsv3_jax.launch.processes import Place

# XLA's CPU backend asks for and returns large buffers in every step. Large pages, and memory that stays with the
# process, spare it all page faults: a training step is more than twice as fast. No threshold keeps buffers over 32 MiB
# from mmap, so that is forbidden altogether, and with it other arenas than the main one, which use it all the same.
MALLOC = ":".join(
    f"glibc.malloc.{name}" for name in ("hugetlb=1", "mmap_max=0", "arena_max=1", "trim_threshold=100000000000")
)

_SETTINGS_HELP = """Settings follow the config file: --steps 40 --output-dir DIR --checkpoint.every 10 --resume auto
--optimizer.peak-lr 3e-4. `dsv3 {command} CONFIG --help` lists them all."""

_STOPPED_HELP = "--stopped-status N  exit status of a run that SIGTERM stopped, after it has saved (default 0)\n"

PLAN_OPTIONS = {
    "--mesh": "sizes of pipe, data, node and gpu: pipe=16,data=2,node=8,gpu=8; from parallel where it is left out",
    "--device": "h800 (default), h100, h200, or a .toml file like theirs",
    "--schedule": "gpipe, 1f1b, interleaved_1f1b, zb1p, dualpipe, ...; from parallel where parallel.pipe > 1, else "
    "dualpipe where it divides",
    "--timeline": "draw the pipeline's timeline into this .png",
    "--search": "print the ten fastest meshes, schedules, microbatches and recomputations of as many devices",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Every error of the user ends in one sentence on stderr and status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_settings:
        parser.error(f"unknown argument {rest[0]}; `dsv3 {arguments.command} --help` lists what there is")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("dsv3_jax").setLevel(logging.INFO)
    # A checkpoint that does not read fails in several tasks at once: we report the first, others would print the rest.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    # What imports and tracing make stays: looking through it every 700 objects takes a tenth of the start.
    gc.set_threshold(50_000)
    try:
        return arguments.run(arguments, rest)
    except (ConfigError, FileNotFoundError, FileExistsError) as error:
        return _fail(str(error))
    except LaunchError as error:
        return _fail(str(error), status=1)
    except (RuntimeError, ValueError) as error:
        # Their classes live in modules that are not imported before they are needed.
        if type(error).__name__ in ("TrainingError", "CheckpointError"):
            return _fail(str(error))
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsv3", description="The DeepSeek-V3 training system in JAX and Flax.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, about: str, takes_settings: bool = False, **options: Any) -> Any:
        sub = commands.add_parser(name, help=about, description=about, **options)
        sub.set_defaults(run=run, takes_settings=takes_settings)
        return sub

    train = command("train", _train, "train a model", True, add_help=False, allow_abbrev=False)
    train.add_argument("config", nargs="?", help="a config file, such as configs/tiny.py")
    train.add_argument("--stopped-status", type=int, default=0)
    about = "print parameters, FLOPs and memory of a config; on a cluster, also its timeline and cost"
    plan = command("plan", _plan, about, True, add_help=False, allow_abbrev=False)
    plan.add_argument("config", nargs="?", help="a config file, such as configs/v3_671b.py")
    for option, help_text in PLAN_OPTIONS.items():
        plan.add_argument(option, help=help_text, action="store_true" if option == "--search" else "store")

    about = "train on many machines, or in many processes on this one"
    add_launchers(command("launch", _launch, about, True, allow_abbrev=False))

    generate = command("generate", _generate, "continue a text with a trained or a published model")
    generate.add_argument("folder", help="output folder of a run, or a folder in the public DeepSeek-V3 layout")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--tokens", type=int, default=100, help="most tokens to write (default 100)")
    generate.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default 0.7)")
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    generate.add_argument("--average", action="store_true", help="use the averaged weights of a run")

    convert = command("convert", _convert, "write a model in another layout")
    convert.add_argument("folder", help="output folder of a run, or a folder in the public DeepSeek-V3 layout")
    convert.add_argument("output", help="folder to write; must be empty or not exist")
    convert.add_argument("--to", choices=["hf"], required=True, help="hf: the public DeepSeek-V3 safetensors layout")
    convert.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="type of the weights")
    convert.add_argument("--average", action="store_true", help="use the averaged weights of a run")
    return parser


def load_config(path: str) -> Config:
    """What `config()` of a config file returns. Raises ConfigError where the file is not one."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path}: no such config file; the shipped ones are in configs/")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: a config is a Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: cannot be loaded ({type(error).__name__}: {error}); correct the file") from error
    if not callable(getattr(module, "config", None)):
        raise ConfigError(f"{path}: has no function config(); it must return a dsv3_jax.config.Config")
    config = module.config()
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: config() returned {type(config).__name__}; return a dsv3_jax.config.Config")
    return config


def override(config: Config, settings: list[str], prog: str) -> Config:
    """The config with settings from the command line. Raises ConfigError where one is unknown or wrong."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Config, default=config, args=settings, prog=prog, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as ended:
        if not ended.code:
            raise
        raise ConfigError(f"{_text_of_box(said.getvalue())} (`{prog} --help` lists all settings)") from None


def _text_of_box(box: str) -> str:
    """What an error in a frame says, as one line without the frame, its title and its last words."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    groups = itertools.groupby(lines, key=lambda line: bool(line.strip("─-")))
    parts = [" ".join(group) for is_text, group in groups if is_text]
    # Without a frame, where the terminal may not know its characters, the title stands above the first rule.
    text = "; ".join(parts if box.startswith("╭") else parts[1:])
    return text.partition("; For full helptext")[0].removeprefix("Error parsing Config: ").removesuffix(".")


def _train(arguments: argparse.Namespace, settings: list[str]) -> int:
    if arguments.config is None:
        return _without_config("train", settings)
    if {"-h", "--help"} & set(settings):
        print(_STOPPED_HELP)
    config = override(load_config(arguments.config), settings, f"dsv3 train {arguments.config}")
    _prepare_process()
    from dsv3_jax.launch.processes import find_place, joined

    place = find_place()
    with joined(config, place):
        _prepare_jax(config, place)
        finished = _train_here(config)
    return 0 if finished else arguments.stopped_status


def _train_here(config: Config) -> bool:
    """This process's part of a run; returns whether it has come to its end."""
    from rich.console import Console

    from dsv3_jax.train.finish import finish
    from dsv3_jax.train.loop import train

    console = Console()
    run = train(config, console)
    if not run.interrupted:
        finish(config, run, console)
    return not run.interrupted


def _launch(arguments: argparse.Namespace, settings: list[str]) -> int:
    config = override(load_config(arguments.config), settings, f"dsv3 launch {arguments.launcher} {arguments.config}")
    return launch(arguments, Training(arguments.config, tuple(settings), config))


def _plan(arguments: argparse.Namespace, settings: list[str]) -> int:
    if arguments.config is None:
        return _without_config("plan", settings)
    if {"-h", "--help"} & set(settings):
        print(_plan_options())
    config = override(load_config(arguments.config), settings, f"dsv3 plan {arguments.config}")
    chosen = {option: getattr(arguments, option[2:]) for option in PLAN_OPTIONS}
    if any(chosen.values()):
        from dsv3_jax.planner.command import run

        run(config, **{option[2:]: value for option, value in chosen.items()})
    else:
        from dsv3_jax.planner.report import print_plan

        print_plan(config)
    return 0


def _generate(arguments: argparse.Namespace, _: list[str]) -> int:
    from dsv3_jax.inference.generate import generate
    from dsv3_jax.inference.load import load_model, load_text_tokenizer

    model = load_model(arguments.folder, average=arguments.average)
    tokenizer = load_text_tokenizer(arguments.folder, model.config.vocab_size)
    prompt = [tokenizer.encode(arguments.prompt)]
    try:
        tokens = generate(
            model,
            prompt,
            arguments.tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            stop_token=tokenizer.eos,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(arguments.prompt + tokenizer.decode(tokens[0, len(prompt[0]) :]))
    return 0


def _convert(arguments: argparse.Namespace, _: list[str]) -> int:
    from dsv3_jax.inference.load import convert_to_hf

    convert_to_hf(arguments.folder, arguments.output, arguments.dtype, average=arguments.average)
    print(f"written to {arguments.output}")
    return 0


def _without_config(command: str, settings: list[str]) -> int:
    """The usage, or what is missing."""
    if not {"-h", "--help"} & set(settings):
        raise ConfigError(f"dsv3 {command} needs a config file; the shipped ones are in configs/")
    print(f"usage: dsv3 {command} CONFIG [settings]\n\n{_SETTINGS_HELP.format(command=command)}")
    print(f"\n{_plan_options() if command == 'plan' else _STOPPED_HELP}", end="")
    return 0


def _plan_options() -> str:
    """What `dsv3 plan` takes besides the settings."""
    return "On a cluster:\n" + "".join(f"  {option:12} {text}\n" for option, text in PLAN_OPTIONS.items())


def _prepare_process() -> None:
    """The memory's settings, which have to be there when the process starts."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": MALLOC})


def _prepare_jax(config: Config, place: "Place | None") -> None:
    """What has to be set before jax first uses its devices: how many are emulated. Process 0 alone logs all."""
    import jax

    count, devices = place.count if place else 1, config.parallel.devices
    if devices is not None:
        if devices % count:
            raise ConfigError(f"parallel.devices={devices}: must be a multiple of the {count} processes")
        # Only the CPU backend reads this.
        jax.config.update("jax_num_cpu_devices", devices // count)
    if place is not None and place.index:
        logging.getLogger("dsv3_jax").setLevel(logging.ERROR)
        # Each process meets other documents.
        logging.getLogger("dsv3_jax.data").setLevel(logging.WARNING)


def _report_unraisable(report: "sys.UnraisableHookArgs") -> None:
    """As usual, but for reads that come back after the restore that wanted them has failed."""
    if not str(report.exc_value).startswith(("Event loop is closed", "Encountered error while reading array")):
        sys.__unraisablehook__(report)


def _fail(message: str, status: int = 2) -> int:
    print(f"dsv3: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
