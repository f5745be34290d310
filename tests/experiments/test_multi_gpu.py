"""The script for several GPUs on emulated devices: that it measures, and how it refuses."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "experiments" / "multi_gpu" / "run.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def output():
    done = run("--tiny", "--devices", "2", "--sections", "exchange,layer,equal", "--steps", "1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bytes_are_those_of_the_rows_that_cross(output):
    """With two devices and 8 of 32 experts a token has an expert on the other one nearly always."""
    rows = re.findall(r"\| (bf16|fp8) \| flat \| ([\d.]+) \|", output.partition("A MoE layer")[0])
    assert [precision for precision, _ in rows] == ["bf16", "fp8"]
    assert all(0.9 < float(crossing) <= 1 for _, crossing in rows)


def test_a_layer_is_timed_in_both_precisions(output):
    rows = re.findall(
        r"\| (bf16|fp8) \| flat \| ([\d.]+) \| -?[\d.]+ \| ([\d.]+) \|", output.partition("A MoE layer")[2]
    )
    assert [precision for precision, *_ in rows] == ["bf16", "fp8"]
    assert all(float(both) > 0 and float(forward) > 0 for _, forward, both in rows)


def test_losses_and_gradients_on_meshes_are_those_of_one_device(output):
    """In float32; sums come in other orders."""
    meshes = re.findall(r"\| (gpu|data|pipe) 2 \| (\S+) \| \S+ \| (\S+) \| (\w+) \|", output)
    assert [mesh for mesh, *_ in meshes] == ["gpu", "data", "pipe"]
    assert all(float(loss) < 1e-5 and float(norm) < 1e-5 and loads == "equal" for _, loss, norm, loads in meshes)


def test_a_pipeline_stands_beside_its_plan(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(RUN.parent))
    training = importlib.import_module("training")
    monkeypatch.setattr(training, "run_steps", lambda *_: (0.5, []))
    configs = training.pipeline_configs(training.Host(2, tiny=False), ["1f1b", "dualpipev"], [2])
    training.measure_pipelines(configs, dict.fromkeys(configs), 1)
    rows = re.findall(r"\| 2 \| (\w+) \| 500 \| (\d+) \| (\d+) \| (\S+) \|", capsys.readouterr().out)
    assert [kind for kind, *_ in rows] == ["1f1b", "dualpipev"]
    for _, lockstep, asynchronous, ratio in rows:
        assert int(asynchronous) <= int(lockstep)
        assert float(ratio) == pytest.approx(500 / int(lockstep), abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sections", "speed"], "--sections: speed: 'speed' is not one of links, exchange"),
        (["--streams", "3"], "--streams: 3: '3' is not one of 1, 2"),
        ([], "needs NVIDIA GPUs; pass --tiny --devices 4 for emulated CPU devices"),
    ],
)
def test_wrong_input_ends_in_a_sentence(arguments, says, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(RUN.parent))
    monkeypatch.setattr(sys, "argv", [str(RUN), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RUN))["main"]()
    assert ended.value.code != 0
    assert says in f"{capsys.readouterr().err}{ended.value.code}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--tiny", "--devices", "2", "--sections", "pipeline", "--pipe", "4"],
            "--pipe 4: does not divide the 2 devices; choose fewer ranks",
        ),
        (["--tiny", "--devices", "1"], "--devices 1: 1 are there; give 2, 4 or 8 of them"),
    ],
)
def test_devices_that_do_not_do_end_in_a_sentence(arguments, says):
    done = run(*arguments)
    assert done.returncode != 0
    assert says in done.stderr.splitlines()[-1]
