"""Devices that a run is planned for: plain data in `devices/*.toml`, or in a file of the user's."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError

_SHIPPED = Path(__file__).parent / "devices"
_RATES = (
    "dense_fp8", "grouped_fp8", "weight_gradient_fp8", "dense_bf16", "grouped_bf16", "weight_gradient_bf16",
    "attention_forward", "attention_backward",
)  # fmt: skip
_SPEEDS = ("memory", "nvlink", "network")


@dataclass(frozen=True, eq=False)
class Device:
    """A GPU in its node: what the data sheet says, and what was achieved."""

    name: str
    memory: float
    """Bytes."""
    gpus_per_node: int
    dollars_per_hour: float
    """Price of one GPU."""
    peak: dict[str, float]
    """Data sheet: dense FLOP/s of `fp8` and `bf16`; bytes/s of `memory`, and each way of `nvlink` and `network`."""
    achieved: dict[str, float]
    """FLOP/s of each kind of product, while the exchange holds its SMs; bytes/s of `memory`, `nvlink`, `network`."""
    busy: float
    """The share of a chunk's time in which the compute stream works; else it waits, for the host or for data."""

    def fraction(self, rate: str) -> float:
        """The share of its peak that a rate achieves."""
        peak = rate if rate in _SPEEDS else "fp8" if rate.endswith("fp8") else "bf16"
        return self.achieved[rate] / self.peak[peak]


def load_device(name: str) -> Device:
    """A shipped device by its name (`h800`, `h100`, `h200`), or one from a TOML file of the same form.

    Raises:
        ConfigError: there is no such device or file, or the file lacks something.
    """
    path = Path(name) if name.endswith(".toml") else _SHIPPED / f"{name.lower()}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in _SHIPPED.glob("*.toml")))
        raise ConfigError(f"--device {name}: no such device; choose one of {known}, or give a .toml file like theirs")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--device {name}: is not TOML ({error}); correct the file") from error
    peak = _section(name, values, "peak", ("fp8", "bf16", *_SPEEDS))
    achieved = _section(name, values, "achieved", (*_RATES, *_SPEEDS))
    sms = _section(name, values, "sms", ("total", "exchange", "measured_on"))
    trace = _section(name, values, "trace", ("busy", "span"))
    share = (sms["total"] - sms["exchange"]) / sms["measured_on"]
    numbers = _section(name, {"": values}, "", ("memory", "gpus_per_node", "dollars_per_hour"))
    return Device(
        name=str(values.get("name", path.stem)),
        memory=numbers["memory"],
        gpus_per_node=int(numbers["gpus_per_node"]),
        dollars_per_hour=numbers["dollars_per_hour"],
        peak=peak,
        achieved={rate: value * (share if rate in _RATES else 1) for rate, value in achieved.items()},
        busy=trace["busy"] / trace["span"],
    )


def _section(device: str, values: dict[str, Any], section: str, names: tuple[str, ...]) -> dict[str, float]:
    """These numbers of a section, all positive."""
    found = values.get(section, {})
    for name in names:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            where = f"[{section}] {name}" if section else name
            raise ConfigError(f"--device {device}: {where}={value!r}: must be a positive number; add it to the file")
    return {name: found[name] for name in names}
