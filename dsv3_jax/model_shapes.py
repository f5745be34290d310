"""The shapes of a model's arrays, from its sizes alone: checkpoints are read by them, memory is planned by them."""

from collections.abc import Iterator

from dsv3_jax.model_config import ModelConfig

Shape = tuple[int, ...]
Shapes = dict[str, "Shapes | Shape"]
Path = tuple[str, ...]


def tree_shapes(model: ModelConfig) -> Shapes:
    """The shape of every leaf of {'params': ..., 'router_bias': ...}."""
    d, vocab, depth = model.d_model, model.vocab_size, model.num_mtp_modules
    params: Shapes = {
        "embed": {"embedding": (vocab, d)},
        "final_norm": {"scale": (d,)},
        "head": {"kernel": (d, vocab)},
    }
    router_bias: Shapes = {}
    if model.num_dense_layers:
        params["dense_layers"] = _stack(model.num_dense_layers, _layer_shapes(model, _dense_shapes(d, model.d_ff)))
    if model.num_moe_layers:
        params["moe_layers"] = _stack(model.num_moe_layers, _layer_shapes(model, _moe_shapes(model)))
        router_bias["moe_layers"] = (model.num_moe_layers, model.num_experts)
    if depth:
        module = {
            "embed_norm": {"scale": (d,)},
            "hidden_norm": {"scale": (d,)},
            "projection": {"kernel": (2 * d, d)},
            "block": _layer_shapes(model, _moe_shapes(model)),
            "final_norm": {"scale": (d,)},
        }
        params["mtp"] = _stack(depth, module)
        router_bias["mtp"] = (depth, model.num_experts)
    return {"params": params, "router_bias": router_bias}


def leaf_shapes(tree: Shapes, path: Path = ()) -> Iterator[tuple[Path, Shape]]:
    """Every leaf of a tree of shapes, with its path."""
    for name, node in tree.items():
        if isinstance(node, tuple):
            yield (*path, name), node
        else:
            yield from leaf_shapes(node, (*path, name))


def is_shape(node: object) -> bool:
    """Whether a node of a tree of shapes is a leaf."""
    return isinstance(node, tuple)


def _stack(size: int, shapes: Shapes) -> Shapes:
    return {name: (size, *node) if isinstance(node, tuple) else _stack(size, node) for name, node in shapes.items()}


def _layer_shapes(model: ModelConfig, ffn: Shapes) -> Shapes:
    d, heads, q_rank = model.d_model, model.num_heads, model.q_lora_rank
    q_width = heads * model.qk_head_dim
    if q_rank is None:
        attention: Shapes = {"q": {"kernel": (d, q_width)}}
    else:
        attention = {
            "q_down": {"kernel": (d, q_rank)},
            "q_norm": {"scale": (q_rank,)},
            "q_up": {"kernel": (q_rank, q_width)},
        }
    attention |= {
        "kv_down": {"kernel": (d, model.kv_lora_rank + model.qk_rope_head_dim)},
        "kv_norm": {"scale": (model.kv_lora_rank,)},
        "kv_up": {"kernel": (model.kv_lora_rank, heads * (model.qk_nope_head_dim + model.v_head_dim))},
        "out": {"kernel": (heads * model.v_head_dim, d)},
    }
    return {"attention_norm": {"scale": (d,)}, "attention": attention, "ffn_norm": {"scale": (d,)}, "ffn": ffn}


def _dense_shapes(d: int, width: int) -> Shapes:
    return {"gate_up": {"kernel": (d, 2 * width)}, "down": {"kernel": (width, d)}}


def _moe_shapes(model: ModelConfig) -> Shapes:
    d, experts, width = model.d_model, model.num_experts, model.d_ff_expert
    shapes: Shapes = {
        "router": {"kernel": (d, experts)},
        "experts": {"gate_up": (experts, d, 2 * width), "down": (experts, width, d)},
    }
    if model.num_shared_experts:
        shapes["shared"] = _dense_shapes(d, model.num_shared_experts * width)
    return shapes
