"""What the command line says: every error of the user is one sentence on stderr, and it answers at once."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_jax import cli
from dsv3_jax.data.tokenizer import train_bpe

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "tests/data/reference/base"
CONFIG = """
from dsv3_jax.config import *

def config():
    return Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=1, num_dense_layers=0, num_heads=1, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=8, kv_lora_rank=8, d_ff_expert=8, num_mtp_modules=0,
        ),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, validation_share=0.3),
        batch=BatchConfig(seq_len=16, sequences=24),
        log=LogConfig(tensorboard=False),
        output_dir={output!r},
    )
"""


@pytest.fixture
def config_file(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"document {i} of the router\n" * 20)
    file = tmp_path / "small.py"
    file.write_text(
        CONFIG.format(source=str(texts), cache=str(tmp_path / "cache"), output=str(tmp_path / "run")),
    )
    return file


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model in the public layout, with a tokenizer that fits it; at most 256 tokens long."""
    folder = tmp_path_factory.mktemp("published")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(PUBLISHED / file, folder)
    train_bpe(["the router sends tokens to experts"] * 5, 300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def error_of(capsys, monkeypatch):
    """Runs a command that must be refused; returns what it says, as one line."""
    # The tests have set up the process already.
    monkeypatch.setattr(cli, "_prepare_process", lambda: None)
    monkeypatch.setattr(cli, "_prepare_jax", lambda config, place: None)

    def run(*argv):
        try:
            status = cli.main(list(map(str, argv)))
        except SystemExit as ended:
            status = ended.code
        printed = capsys.readouterr()
        assert status == 2, printed
        assert "Traceback" not in printed.err
        return printed.err.strip()

    return run


def assert_is_one_sentence(message, *parts):
    assert message.startswith("dsv3: ")
    assert message.count("dsv3: ") == 1
    assert "\n" not in message
    for part in parts:
        assert part in message


BAD_CONFIGS = {
    "syntax error": ("def config(:\n", ["cannot be loaded (SyntaxError", "correct the file"]),
    "unknown import": ("import no_such_package\n", ["cannot be loaded (ModuleNotFoundError", "no_such_package"]),
    "no function": ("x = 1\n", ["has no function config()"]),
    "other type": ("def config():\n    return {}\n", ["config() returned dict", "return a dsv3_jax.config.Config"]),
    "inconsistent": (
        "from dsv3_jax.config import *\ndef config():\n    return Config(model=ModelConfig(num_experts=15))\n",
        ["model.num_experts=15: must be a multiple of model.num_groups=4"],
    ),
}


@pytest.mark.parametrize(("text", "parts"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
@pytest.mark.parametrize("command", ["plan", "train"])
def test_bad_config_file(error_of, tmp_path, command, text, parts):
    file = tmp_path / "bad.py"
    file.write_text(text)
    assert_is_one_sentence(error_of(command, file), *parts)


def test_missing_config_file_and_one_that_is_no_python(error_of, tmp_path):
    missing = tmp_path / "missing.py"
    assert_is_one_sentence(error_of("train", missing), f"{missing}: no such config file", "configs/")
    (tmp_path / "config.yaml").write_text("steps: 3")
    assert_is_one_sentence(error_of("plan", tmp_path / "config.yaml"), "give one that ends in .py")


BAD_SETTINGS = {
    "unknown": (["--model.num-expert", 16], ["--model.num-expert", "Unrecognized"]),
    "inconsistent": (
        ["--model.num-experts", 15],
        ["model.num_experts=15: must be a multiple of model.num_groups=4"],
    ),
    "inconsistent in two sections": (["--batch.seq-len", 8192], ["batch.seq_len=8192", "model.max_length=4096"]),
    "wrong type": (["--steps", "many"], ["--steps", "many"]),
    "not a choice": (["--precision", "int8"], ["--precision", "int8", "bf16"]),
    "no value": (["--steps"], ["--steps"]),
    "experts do not divide": (["--parallel.devices", 3], ["model.num_experts=16", "3 devices"]),
    "mesh contradicts itself": (
        ["--parallel.devices", 4, "--parallel.data", 3, "--parallel.gpu", 1],
        ["data 3 x node 1 x gpu 1", "there are 4", "change parallel.pipe, parallel.data"],
    ),
}


PIPELINE = ["--parallel.devices", 6, "--batch.sequences", 12, "--batch.microbatch", 3]
BAD_PIPELINES = {
    "odd ranks": (["--parallel.pipe", 3, "--parallel.schedule", "dualpipe"], ["parallel.pipe=3", "use an even number"]),
    "odd microbatches": (
        ["--parallel.pipe", 2, "--parallel.schedule", "dualpipe", "--batch.sequences", 15],
        ["15 sequences has 5", "use an even number; change batch.microbatch=3 or batch.sequences"],
    ),
    "unknown schedule": (["--parallel.pipe", 2, "--parallel.schedule", "dualpip"], ["'dualpip'", "'dualpipev'"]),
    "more ranks than layers": (["--parallel.pipe", 6], ["parallel.pipe=6", "model.num_layers=1; lower parallel.pipe"]),
    "no ranks": (["--parallel.schedule", "dualpipe"], ["parallel.pipe=1 is none; set parallel.pipe"]),
}


@pytest.mark.parametrize(("settings", "parts"), BAD_PIPELINES.values(), ids=BAD_PIPELINES.keys())
def test_bad_pipeline_is_one_sentence_with_its_remedy(error_of, config_file, settings, parts):
    assert_is_one_sentence(error_of("train", config_file, *PIPELINE, *settings), *parts)


@pytest.mark.parametrize(("settings", "parts"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
@pytest.mark.parametrize("command", ["plan", "train"])
def test_bad_setting_is_named(error_of, config_file, command, settings, parts):
    assert_is_one_sentence(error_of(command, config_file, *settings), *parts)


def test_data_that_is_not_there(error_of, config_file, tmp_path):
    (tmp_path / "empty").mkdir()
    message = error_of("train", config_file, "--data.source", tmp_path / "empty")
    assert_is_one_sentence(message, "data.source=", "empty", "found nothing", ".txt")
    message = error_of("train", config_file, "--data.source", tmp_path / "nowhere")
    assert_is_one_sentence(message, "data.source=", "nowhere", "no such file or folder", "'stdlib'")
    message = error_of("train", config_file, "--data.tokenizer", tmp_path / "nothing.json")
    assert_is_one_sentence(message, "data.tokenizer=", "nothing.json", "does not read as a tokenizer.json")


def test_wandb_that_is_not_installed(error_of, config_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    # The weights take seconds to compile and are not reached.
    monkeypatch.setattr("dsv3_jax.train.loop.init_state", lambda config, mesh: None)
    message = error_of("train", config_file, "--log.wandb-project", "mine")
    assert_is_one_sentence(message, "log.wandb_project='mine'", "not installed", "pip install")


def test_generate_and_convert_want_a_model(error_of, published, tmp_path):
    for command in (["generate", tmp_path, "--prompt", "a"], ["convert", tmp_path, tmp_path / "to", "--to", "hf"]):
        assert_is_one_sentence(error_of(*command), str(tmp_path), "neither checkpoints of a run nor a config.json")
    (tmp_path / "checkpoints").mkdir()
    assert_is_one_sentence(error_of("generate", tmp_path, "--prompt", "a"), "holds no complete checkpoint")
    assert_is_one_sentence(error_of("generate", PUBLISHED, "--prompt", "a"), "tokenizer.json: is missing")
    assert_is_one_sentence(
        error_of("generate", published, "--prompt", "a", "--average"), "a published model has no averaged weights"
    )
    assert_is_one_sentence(error_of("convert", published, published, "--to", "hf"), f"{published} is not empty")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoints").rmdir()
    assert_is_one_sentence(error_of("generate", tmp_path, "--prompt", "a"), f"{tmp_path / 'config.json'}")


def test_generate_refuses_what_it_cannot_continue(error_of, published):
    assert_is_one_sentence(error_of("generate", published, "--prompt", ""), "the prompt", "give at least one token")
    message = error_of("generate", published, "--prompt", "the router", "--tokens", 256)
    assert_is_one_sentence(message, "256 new ones exceed model.max_length=256", "ask for fewer tokens")
    message = error_of("generate", published, "--prompt", "a", "--temperature=-1")
    assert_is_one_sentence(message, "temperature=-1.0: cannot be negative")


def test_unknown_commands_and_arguments(error_of, published):
    assert "choose from" in error_of("frobnicate")
    assert "COMMAND" in error_of()
    assert "unknown argument --color" in error_of("generate", published, "--prompt", "a", "--color", "red")
    assert "--to" in error_of("convert", published, "somewhere")


def test_settings_of_a_config_are_listed_with_what_they_mean(capsys, config_file):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(config_file), "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--model.num-experts" in printed
    assert "Routed experts of a MoE layer." in printed


def test_help_answers_within_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dsv3_jax.cli", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1, seconds


def test_command_line_imports_nothing_heavy_before_it_is_needed():
    program = "import sys, dsv3_jax.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert not {"jax", "flax", "numpy", "orbax", "tyro", "rich"} & set(done.stdout.split())


def test_plan_of_the_671b_model_prints_the_published_numbers(capsys):
    assert cli.main(["plan", str(ROOT / "configs/v3_671b.py")]) == 0
    printed = capsys.readouterr().out
    for number in ("671,026,404,352", "11,610,067,968", "70,272", "250.4"):
        assert number in printed


REPORT_MESH = ["--mesh", "pipe=16,data=2,node=8,gpu=8"]


def test_plan_on_the_reports_cluster(capsys, tmp_path):
    picture = tmp_path / "out.png"
    config = str(ROOT / "configs/v3_671b.py")
    assert cli.main(["plan", config, *REPORT_MESH, "--device", "h800", "--timeline", str(picture)]) == 0
    printed = capsys.readouterr().out
    for part in ("671,026,404,352", "250.4", "2,048 H800", "One F+B pair of 4 MoE layers", "the largest: activations"):
        assert part in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_is_of_the_schedule_that_a_pipelined_config_trains_with(capsys):
    settings = [*REPORT_MESH, "--parallel.schedule", "dualpipev"]
    assert cli.main(["plan", str(ROOT / "configs/v3_671b.py"), *settings]) == 0
    assert "dualpipev with 120 microbatches" in capsys.readouterr().out


def test_plan_searches_on_the_devices_of_the_settings(capsys, config_file):
    settings = ["--parallel.devices", "8", "--parallel.gpu", "4", "--search", "--precision", "bf16"]
    assert cli.main(["plan", str(config_file), *settings]) == 0
    assert "The best on 8 H800" in capsys.readouterr().out


BAD_PLANS = {
    "mesh is none": (["--mesh", "pipe:16"], ["--mesh pipe:16", "'pipe:16' is not one of pipe, data, node, gpu"]),
    "mesh does not divide": (
        ["--mesh", "pipe=16,data=3,node=8,gpu=8"], ["batch.microbatch=128", "192 devices", "change it or the mesh"],
    ),
    "experts do not divide": (["--mesh", "node=3,gpu=8"], ["model.num_experts=256", "24 devices"]),
    "unknown device": ([*REPORT_MESH, "--device", "b300"], ["--device b300", "choose one of h100, h200, h800"]),
    "unknown schedule": ([*REPORT_MESH, "--schedule", "zigzag"], ["schedule='zigzag'", "choose one of gpipe, 1f1b"]),
    "odd ranks": (["--mesh", "pipe=3,node=8,gpu=8", "--schedule", "dualpipe"], ["ranks=3", "use an even number"]),
    "no rates": ([*REPORT_MESH, "--precision", "fp32"], ["precision='fp32'", "pass --precision bf16"]),
    "no mesh": (["--timeline", "out.png"], ["leaves the number of devices open", "--mesh pipe=16,data=2,node=8,gpu=8"]),
    "no picture": ([*REPORT_MESH, "--timeline", "out.jpg"], ["--timeline out.jpg", "ends in .png"]),
    "no folder": ([*REPORT_MESH, "--timeline", "no/such/a.png"], ["--timeline no/such/a.png", "no such folder"]),
    "nothing fits": (["--mesh", "gpu=8", "--search"], ["nothing fits 8 x H800", "use more devices"]),
}  # fmt: skip


@pytest.mark.parametrize(("options", "parts"), BAD_PLANS.values(), ids=BAD_PLANS.keys())
def test_bad_plan_is_refused_in_one_sentence(error_of, options, parts):
    assert_is_one_sentence(error_of("plan", ROOT / "configs/v3_671b.py", *options), *parts)


def test_plan_lists_its_options_with_the_settings(capsys, config_file):
    with pytest.raises(SystemExit):
        cli.main(["plan", str(config_file), "--help"])
    printed = capsys.readouterr().out
    for part in ("--mesh", "--timeline", "--search", "--model.num-experts"):
        assert part in printed
    assert cli.main(["plan", "--help"]) == 0
    assert "--mesh" in capsys.readouterr().out


def test_error_in_a_process_of_its_own_is_one_line(config_file):
    command = [sys.executable, "-m", "dsv3_jax.cli", "plan", config_file, "--parallel.devices", "3"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("dsv3: model.num_experts=16: ")
