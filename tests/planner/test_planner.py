"""The published figures of the 671B model to the last digit, and the public checkpoint's own count of elements."""

import dataclasses
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import BatchConfig, Config, ConfigError, ModelConfig, ParallelConfig
from dsv3_jax.planner.flops import training_flops_per_token, training_flops_per_token_with_mtp
from dsv3_jax.planner.memory import kv_cache_bytes_per_token, training_memory
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.planner.report import plan, print_plan

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str) -> Config:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]()


@pytest.fixture(scope="module")
def v3() -> Config:
    return load("v3_671b")


# The published checkpoint, tensor by tensor, from its documented names and shapes: shares no code with the planner.

FP8, BF16 = "fp8", "bf16"


def attention_tensors() -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "input_layernorm": ((7168,), BF16),
        "post_attention_layernorm": ((7168,), BF16),
        "q_a_proj": ((1536, 7168), FP8),
        "q_a_layernorm": ((1536,), BF16),
        "q_b_proj": ((24576, 1536), FP8),
        "kv_a_proj_with_mqa": ((576, 7168), FP8),
        "kv_a_layernorm": ((512,), BF16),
        "kv_b_proj": ((32768, 512), FP8),
        "o_proj": ((7168, 16384), FP8),
    }


def ffn_tensors(prefix: str, width: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        f"{prefix}.gate_proj": ((width, 7168), FP8),
        f"{prefix}.up_proj": ((width, 7168), FP8),
        f"{prefix}.down_proj": ((7168, width), FP8),
    }


def moe_tensors() -> dict[str, tuple[tuple[int, ...], str]]:
    tensors = {"gate": ((256, 7168), BF16), "e_score_correction_bias": ((256,), BF16)}
    for expert in range(256):
        tensors |= ffn_tensors(f"experts.{expert}", 2048)
    return tensors | ffn_tensors("shared_experts", 2048)


def checkpoint_tensors() -> dict[str, tuple[int, ...]]:
    tensors = {"embed_tokens": ((129280, 7168), BF16), "lm_head": ((129280, 7168), BF16), "norm": ((7168,), BF16)}
    for layer in range(62):
        block = attention_tensors() | (ffn_tensors("mlp", 18432) if layer < 3 else moe_tensors())
        if layer == 61:
            block |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), ((7168,), BF16))
            block |= dict.fromkeys(("mtp.embed_tokens", "shared_head.head"), ((129280, 7168), BF16))
            block["eh_proj"] = ((7168, 14336), BF16)
        tensors |= {f"{layer}.{name}": tensor for name, tensor in block.items()}
    shapes = {name: shape for name, (shape, _) in tensors.items()}
    for name, (shape, dtype) in tensors.items():
        if dtype == FP8:
            shapes[f"{name}_scale_inv"] = tuple(math.ceil(size / 128) for size in shape)
    return shapes


def test_671b_parameters_are_the_published_ones(v3: Config) -> None:
    count = count_parameters(v3.model)
    assert count.main == 671_026_404_352
    assert count.mtp == 11_610_067_968
    assert round(count.active / 1e9) == 37


def test_671b_parameters_account_for_every_element_of_the_public_checkpoint(v3: Config) -> None:
    shapes = checkpoint_tensors()
    assert len(shapes) == 91_991
    elements = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(elements.values()) == 684_531_386_000

    scales = sum(n for name, n in elements.items() if name.endswith("_scale_inv"))
    biases = sum(n for name, n in elements.items() if name.endswith("e_score_correction_bias"))
    assert (scales, biases) == (41_540_496, 59 * 256)
    count = count_parameters(v3.model)
    assert count.main + count.mtp + (count.embedding + count.head) + scales + biases == 684_531_386_000


def test_671b_training_flops_are_250_gflop_a_token_at_4096(v3: Config) -> None:
    assert training_flops_per_token(v3.model, 4096) == 250_449_887_232


def test_671b_caches_70272_bytes_a_token(v3: Config) -> None:
    assert kv_cache_bytes_per_token(v3.model) == 70_272


def test_671b_run_takes_the_published_tokens_and_warms_up_for_2000_steps(v3: Config) -> None:
    assert v3.batch.tokens_after(v3.steps) == pytest.approx(14.8e12, rel=1e-5)
    assert v3.batch.tokens_after(2000) == pytest.approx(v3.optimizer.warmup_tokens, rel=1e-3)
    assert (v3.batch.sequences_at(0), v3.batch.sequences_at(int(469e9))) == (3072, 15360)


def test_16b_and_small_have_the_sizes_they_are_named_for() -> None:
    moe_16b, small = load("moe_16b"), load("small")
    count = count_parameters(moe_16b.model)
    assert (round(count.main / 1e9, 1), int(count.active / 1e8)) == (15.7, 24)  # 2.45B: the report says 2.4B
    assert moe_16b.batch.tokens_after(moe_16b.steps) == pytest.approx(1.33e12, rel=1e-5)
    assert count_parameters(small.model).total == pytest.approx(100e6, rel=0.1)


@pytest.mark.parametrize("name", ["small", "moe_16b"])
def test_docstring_quotes_the_planner(name: str) -> None:
    count = count_parameters(load(name).model)
    text = (CONFIGS / f"{name}.py").read_text()
    assert all(f"{figure:,}" in text for figure in (count.main, count.active, count.mtp))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_builds_and_plans(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = runpy.run_path(str(path), run_name=path.stem)
    functions = [n for n, v in module.items() if getattr(v, "__module__", "") == path.stem and not n.startswith("_")]
    assert functions == ["config"]
    assert module["__doc__"]
    config = module["config"]()
    assert isinstance(config, Config)
    print_plan(config)
    assert f"{count_parameters(config.model).main:,}" in capsys.readouterr().out


def parameter_tree(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by name, as the network declares them."""
    m, d = model, model.d_model
    q_width = m.num_heads * (m.qk_nope_head_dim + m.qk_rope_head_dim)

    def block(name: str, moe: bool) -> dict[str, tuple[int, ...]]:
        tree = {"attention_norm": (d,), "kv_down": (d, m.kv_lora_rank + m.qk_rope_head_dim),
                "kv_norm": (m.kv_lora_rank,), "out": (m.num_heads * m.v_head_dim, d), "ffn_norm": (d,),
                "kv_up": (m.kv_lora_rank, m.num_heads * (m.qk_nope_head_dim + m.v_head_dim))}  # fmt: skip
        if m.q_lora_rank is None:
            tree["q"] = (d, q_width)
        else:
            tree |= {"q_down": (d, m.q_lora_rank), "q_norm": (m.q_lora_rank,), "q_up": (m.q_lora_rank, q_width)}
        if moe:
            fe, shared = m.d_ff_expert, m.num_shared_experts * m.d_ff_expert
            tree |= {"router": (d, m.num_experts), "experts_gate_up": (m.num_experts, d, 2 * fe),
                     "experts_down": (m.num_experts, fe, d), "shared_gate_up": (d, 2 * shared),
                     "shared_down": (shared, d)}  # fmt: skip
        else:
            tree |= {"gate_up": (d, 2 * m.d_ff), "down": (m.d_ff, d)}
        return {f"{name}.{key}": shape for key, shape in tree.items()}

    tree = {"embedding": (m.vocab_size, d), "head": (d, m.vocab_size), "final_norm": (d,)}
    for layer in range(m.num_layers):
        tree |= block(f"layers.{layer}", layer >= m.num_dense_layers)
    for k in range(m.num_mtp_modules):
        norms = {f"mtp.{k}.{norm}": (d,) for norm in ("embed_norm", "hidden_norm", "final_norm")}
        tree |= block(f"mtp.{k}.block", True) | norms | {f"mtp.{k}.projection": (2 * d, d)}
    return tree


sizes = st.integers(1, 9)
models = st.builds(
    lambda groups, per_group, reach, layers, dense, rope, **kwargs: ModelConfig(
        num_groups=groups, num_experts=groups * per_group, top_k_groups=min(reach, groups), top_k=2, num_layers=layers,
        num_dense_layers=min(dense, layers), qk_rope_head_dim=2 * rope, **kwargs,
    ),
    groups=st.integers(1, 4), per_group=st.integers(2, 4), reach=st.integers(1, 4), layers=st.integers(1, 5),
    dense=st.integers(0, 5), rope=sizes, vocab_size=sizes, d_model=sizes, d_ff=sizes, num_heads=sizes,
    qk_nope_head_dim=sizes, v_head_dim=sizes, q_lora_rank=st.none() | sizes, kv_lora_rank=sizes, d_ff_expert=sizes,
    num_shared_experts=st.integers(0, 3), num_mtp_modules=st.integers(0, 3),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(models)
def test_counts_are_those_of_the_parameter_tree(model: ModelConfig) -> None:
    tree = {name: math.prod(shape) for name, shape in parameter_tree(model).items()}
    mtp = {name: n for name, n in tree.items() if name.startswith("mtp")}
    main = {name: n for name, n in tree.items() if name not in mtp}
    count = count_parameters(model)
    assert (count.main, count.mtp, count.total) == (sum(main.values()), sum(mtp.values()), sum(tree.values()))

    def ending(part: dict[str, int], *ends: str) -> int:
        return sum(n for name, n in part.items() if name.endswith(ends))

    for part, counted in ((main, count), (mtp, count.mtp_modules)):
        assert counted.routed_experts == ending(part, "experts_gate_up", "experts_down")
        assert counted.shared_experts == ending(part, "shared_gate_up", "shared_down")
        assert counted.norms == ending(part, "norm")
        assert counted.router == ending(part, "router")
        assert counted.attention == ending(part, ".q", "q_down", "q_up", "kv_down", "kv_up", ".out")


@settings(max_examples=60, deadline=None)
@given(models, st.integers(2, 64))
def test_flops_are_those_of_the_matrices_of_the_tree(model: ModelConfig, seq_len: int) -> None:
    def pass_through(name: str, shape: tuple[int, ...]) -> int:
        if name.endswith("norm") or name == "embedding":
            return 0
        return model.top_k * math.prod(shape[1:]) if ".experts" in name else math.prod(shape)

    tree = {name: pass_through(name, shape) for name, shape in parameter_tree(model).items()}
    own = sum(n for name, n in tree.items() if not name.startswith("mtp"))
    with_mtp = sum(tree.values()) + model.num_mtp_modules * tree["head"]
    attention = 2 * seq_len / 2 * model.num_heads * (model.qk_head_dim + model.v_head_dim)
    blocks = model.num_layers + model.num_mtp_modules
    assert training_flops_per_token(model, seq_len) == 6 * own + 3 * model.num_layers * attention
    assert training_flops_per_token_with_mtp(model, seq_len) == 6 * with_mtp + 3 * blocks * attention


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(1, 6), growth=st.integers(0, 12), micro=st.integers(1, 5), ramp=st.integers(1, 5000),
    grain=st.integers(1, 3), steps=st.integers(1, 60),
)  # fmt: skip
def test_growing_batch_never_shrinks_stays_whole_and_counts_every_step(
    start: int, growth: int, micro: int, ramp: int, grain: int, steps: int
) -> None:
    batch = BatchConfig(
        seq_len=8, sequences=(start + growth) * micro, start_sequences=start * micro, ramp_tokens=ramp,
        ramp_microbatches=grain, microbatch=micro,
    )  # fmt: skip
    tokens, taken = 0, []
    for _ in range(steps):
        taken.append(batch.sequences_at(tokens))
        tokens += taken[-1] * batch.seq_len
    assert batch.tokens_after(steps) == tokens
    assert taken == sorted(taken)
    assert set(taken) <= set(batch.sizes)
    assert batch.sizes == [*range(start * micro, (start + growth) * micro, grain * micro), (start + growth) * micro]
    assert batch.sequences_at(ramp) == batch.sequences


def test_state_is_split_over_all_devices_and_experts_over_their_group(v3: Config) -> None:
    count = count_parameters(v3.model)
    experts = 59 * 256 * 3 * 7168 * 2048
    one, four = (training_memory(v3, {"data": data, "node": 8, "gpu": 8}) for data in (1, 4))
    assert one.master == math.ceil(count.total / 64) * 4
    assert one.moments == one.master  # two of them, in BF16
    assert one.weights == 2 * (count.total - experts + experts // 64)
    assert one.gradients == 2 * one.weights
    assert one.average == one.master, "the average lives on the host, and is no part of the total"
    assert one.total == one.master + one.moments + one.weights + one.gradients
    assert four.master == pytest.approx(one.master / 4, rel=1e-8)
    assert (four.weights, four.gradients) == (one.weights, one.gradients)
    fp8 = dataclasses.replace(v3, precision="fp8")  # one byte, twice
    assert training_memory(fp8, {"data": 1, "node": 8, "gpu": 8}).weights == one.weights
    full = dataclasses.replace(v3, precision="fp32")
    assert training_memory(full, {"data": 1, "node": 8, "gpu": 8}).weights == 2 * one.weights


def test_mesh_that_cannot_hold_the_experts_is_refused(v3: Config) -> None:
    wrong = dataclasses.replace(v3, parallel=ParallelConfig(data=1, node=3, gpu=8))
    with pytest.raises(ConfigError, match=r"model\.num_experts=256.*parallel\.node x parallel\.gpu = 24"):
        plan(wrong)


def test_memory_is_planned_only_for_a_known_number_of_devices(v3: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(v3).memory is None
    known = dataclasses.replace(v3, parallel=dataclasses.replace(v3.parallel, pipe=1, schedule="1f1b", devices=128))
    assert plan(known).mesh == {"pipe": 1, "data": 2, "node": 8, "gpu": 8}
    print_plan(known)
    out = capsys.readouterr().out
    for figure in ("671,026,404,352", "11,610,067,968", "250.4", "70,272", "data 2 x node 8 x gpu 8"):
        assert figure in out


def test_planner_imports_no_jax() -> None:
    code = "import sys, dsv3_jax.planner.report; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
