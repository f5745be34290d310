"""Device files: the shipped ones, the user's own, and those that are wrong."""

import re
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.planner import devices
from dsv3_jax.planner.devices import load_device

FOLDER = Path(devices.__file__).parent / "devices"


@pytest.mark.parametrize("name", ["h800", "h100", "h200"])
def test_shipped_devices_achieve_less_than_their_peak(name):
    device = load_device(name)
    assert device.name == name.upper()
    assert all(0 < device.fraction(rate) <= 1 for rate in device.achieved)
    assert 0 < device.busy < 1


def test_h800_holds_the_rates_of_the_published_trace():
    achieved = load_device("h800").achieved
    names = ("grouped_fp8", "dense_fp8", "weight_gradient_fp8", "attention_forward", "attention_backward")
    assert [achieved[name] / 1e12 for name in names] == [1007, 804, 584, 555, 454]


def test_rates_measured_on_all_sms_lose_those_of_the_exchange(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text((FOLDER / "h200.toml").read_text())
    with_exchange = load_device(str(file))
    file.write_text(re.sub(r"exchange = 20 ", "exchange = 1e-9 ", file.read_text()))
    assert with_exchange.achieved["dense_fp8"] == pytest.approx(
        load_device(str(file)).achieved["dense_fp8"] * 112 / 132
    )
    assert with_exchange.achieved["network"] == load_device(str(file)).achieved["network"]


def test_wrong_devices_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="--device b300: no such device; choose one of h100, h200, h800, or give a"):
        load_device("b300")
    file = tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match="no such device"):
        load_device(str(file))
    file.write_text("name =")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_device(str(file))
    text = (FOLDER / "h800.toml").read_text()
    file.write_text(text.replace("dense_fp8 = 804e12", "dense_fp8 = -1"))
    with pytest.raises(ConfigError, match=re.escape("[achieved] dense_fp8=-1: must be a positive number")):
        load_device(str(file))
    file.write_text(text.replace("gpus_per_node = 8", ""))
    with pytest.raises(ConfigError, match="gpus_per_node=None: must be a positive number; add it to the file"):
        load_device(str(file))
