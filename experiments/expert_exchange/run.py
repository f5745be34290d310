"""Counts what the expert exchange of the 671B model sends over each link: flat against hierarchical.

python experiments/expert_exchange/run.py
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.cli import load_config
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import Router
from dsv3_jax.parallel.traffic import RowsSent, rows_sent_flat, rows_sent_hierarchical, rows_sent_per_expert
from dsv3_jax.planner.exchange import row_bytes

CONFIG = Path(__file__).parents[2] / "configs" / "v3_671b.py"
NODES, GPUS = 8, 8
BANDWIDTH = {"node": 50e9, "gpu": 160e9}
"""Bytes a second that a GPU sends over each link (report 3.2.2)."""
COUNTS = {"a row an expert": rows_sent_per_expert, "flat": rows_sent_flat, "hierarchical": rows_sent_hierarchical}


def route(model: ModelConfig, tokens: int) -> np.ndarray:
    """The choices of a new router of the model for the tokens of every device, [nodes, gpus, tokens, top_k].

    Tokens are normal vectors, as the norm before the router makes them: the router spreads them evenly.
    """
    router = jax.jit(Router(model, nnx.Rngs(0)))
    bias = jnp.zeros(model.num_experts)
    chosen = [
        router(jax.random.normal(jax.random.key(device), (1, tokens, model.d_model)), bias).experts[0]
        for device in range(NODES * GPUS)
    ]
    return np.asarray(chosen).reshape(NODES, GPUS, tokens, model.top_k)


def lines(model: ModelConfig, tokens: int, name: str, sent: RowsSent) -> list[str]:
    """Rows of the table: one for each link."""
    size = row_bytes(model, "fp8")
    table = []
    for axis, bandwidth in BANDWIDTH.items():
        rows = getattr(sent, axis)
        busiest = rows.max()
        figures = [rows.mean() / tokens, busiest / tokens, rows.mean() * size["dispatch"] / 1e6]
        figures += [rows.mean() * size["combine"] / 1e6]
        cells = [f"{x:.2f}" for x in figures[:2]] + [f"{x:.0f}" for x in figures[2:]]
        times = [1e3 * busiest * size[way] / bandwidth for way in ("dispatch", "combine")]
        cells += [f"{x:.2f}" for x in (*times, sum(times))]
        table.append(f"| {name} | `{axis}`, {bandwidth / 1e9:.0f} GB/s | " + " | ".join(cells) + " |")
    return table


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a GPU")
    tokens = parser.parse_args().tokens
    model = load_config(str(CONFIG)).model
    experts = route(model, tokens)
    load = np.bincount(experts.reshape(-1), minlength=model.num_experts)
    nodes = experts // (model.num_experts // NODES)
    reached = (nodes[..., None] == np.arange(NODES)).any(axis=-2)
    others = reached & ~np.eye(NODES, dtype=bool)[:, None, None]
    print(
        f"{tokens} tokens on each of {NODES} x {GPUS} GPUs; busiest expert {load.max() / load.mean():.3f} of the mean"
    )
    print(f"nodes that a token reaches: {reached.sum(-1).mean():.3f} on average, {reached.sum(-1).max()} at most")
    print(f"of them not its own: {others.sum(-1).mean():.3f} on average, {others.sum(-1).max()} at most\n")
    headers = ["exchange", "link", "rows a token", "busiest GPU", "dispatch MB", "combine MB"]
    headers += ["dispatch ms", "combine ms", "both ms"]
    print("| " + " | ".join(headers) + " |\n" + "|---" * 2 + "|---:" * (len(headers) - 2) + "|")
    for name, count in COUNTS.items():
        print("\n".join(lines(model, tokens, name, count(experts, model.num_experts))))


if __name__ == "__main__":
    main()
