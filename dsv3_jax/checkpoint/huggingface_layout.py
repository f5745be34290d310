"""Which tensor of the public DeepSeek-V3 checkpoint is which part of the parameter tree.

Kernels are [in, out] here and [out, in] there; gate and up projections are one kernel here, gate first; layers of one
kind, and the experts of a layer, are stacked here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model_shapes import Path, is_shape, tree_shapes

SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class Place:
    """Where a tensor of the public checkpoint lives: `leaf[index]`, transposed unless `transposed` is False."""

    path: Path
    index: tuple[int | slice, ...] = ()
    transposed: bool = True

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The part of the leaf at `path` that is this tensor, in the public checkpoint's orientation."""
        part = leaf[self.index]
        return part.T if self.transposed else part


def tensor_places(model: ModelConfig) -> dict[str, Place]:
    """Every tensor of the public checkpoint by name, in the order of the layers, without the MTP layers' copies."""
    places = {"model.embed_tokens.weight": Place(("params", "embed", "embedding"), transposed=False)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        if layer < model.num_dense_layers:
            path, k = ("params", "dense_layers"), layer
            places |= _layer_places(prefix, path, k, model)
            places |= _ffn_places(f"{prefix}.mlp", (*path, "ffn"), k, model.d_ff)
        else:
            path, k = ("params", "moe_layers"), layer - model.num_dense_layers
            places |= _layer_places(prefix, path, k, model)
            places |= _moe_places(prefix, path, ("router_bias", "moe_layers"), k, model)
    places["model.norm.weight"] = Place(("params", "final_norm", "scale"))
    places["lm_head.weight"] = Place(("params", "head", "kernel"))
    for k in range(model.num_mtp_modules):
        places |= _mtp_places(f"model.layers.{model.num_layers + k}", k, model)
    return places


def copied_tensors(model: ModelConfig) -> dict[str, str]:
    """The MTP layers' copies of the embedding and the head, by name, and the tensor each repeats (report 2.2)."""
    copies = {}
    for layer in mtp_layers(model):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return copies


def mtp_layers(model: ModelConfig) -> range:
    """The layer indices the public checkpoint gives to the MTP modules."""
    return range(model.num_layers, model.num_layers + model.num_mtp_modules)


def tensor_shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The shape of every tensor of `tensor_places`, in its order and in the public checkpoint's orientation."""
    shapes = tree_shapes(model)
    leaves = jax.tree.map(lambda shape: np.broadcast_to(np.uint8(0), shape), shapes, is_leaf=is_shape)
    for name, place in tensor_places(model).items():
        yield name, place.view(leaf_at(leaves, place.path)).shape


def leaf_at(tree: dict, path: Path) -> np.ndarray:
    """The leaf at a path of nested dicts."""
    for key in path:
        tree = tree[key]
    return tree


def _layer_places(prefix: str, path: Path, k: int, model: ModelConfig) -> dict[str, Place]:
    if model.q_lora_rank is None:
        queries = {"self_attn.q_proj": ("attention", "q", "kernel")}
    else:
        queries = {
            "self_attn.q_a_proj": ("attention", "q_down", "kernel"),
            "self_attn.q_a_layernorm": ("attention", "q_norm", "scale"),
            "self_attn.q_b_proj": ("attention", "q_up", "kernel"),
        }
    names = {
        "input_layernorm": ("attention_norm", "scale"),
        **queries,
        "self_attn.kv_a_proj_with_mqa": ("attention", "kv_down", "kernel"),
        "self_attn.kv_a_layernorm": ("attention", "kv_norm", "scale"),
        "self_attn.kv_b_proj": ("attention", "kv_up", "kernel"),
        "self_attn.o_proj": ("attention", "out", "kernel"),
        "post_attention_layernorm": ("ffn_norm", "scale"),
    }
    return {f"{prefix}.{name}.weight": Place((*path, *leaf), (k,)) for name, leaf in names.items()}


def _ffn_places(prefix: str, path: Path, k: int, width: int) -> dict[str, Place]:
    return _swiglu_places(prefix, (*path, "gate_up", "kernel"), (*path, "down", "kernel"), (k,), width)


def _swiglu_places(prefix: str, gate_up: Path, down: Path, index: tuple[int, ...], width: int) -> dict[str, Place]:
    return {
        f"{prefix}.gate_proj.weight": Place(gate_up, (*index, slice(None), slice(0, width))),
        f"{prefix}.up_proj.weight": Place(gate_up, (*index, slice(None), slice(width, None))),
        f"{prefix}.down_proj.weight": Place(down, index),
    }


def _moe_places(prefix: str, path: Path, bias: Path, k: int, model: ModelConfig) -> dict[str, Place]:
    ffn, width = (*path, "ffn"), model.d_ff_expert
    places = {
        f"{prefix}.mlp.gate.weight": Place((*ffn, "router", "kernel"), (k,)),
        f"{prefix}.mlp.gate.e_score_correction_bias": Place(bias, (k,)),
    }
    for e in range(model.num_experts):
        name = f"{prefix}.mlp.experts.{e}"
        places |= _swiglu_places(name, (*ffn, "experts", "gate_up"), (*ffn, "experts", "down"), (k, e), width)
    if model.num_shared_experts:
        shared = model.num_shared_experts * width
        places |= _ffn_places(f"{prefix}.mlp.shared_experts", (*ffn, "shared"), k, shared)
    return places


def _mtp_places(prefix: str, k: int, model: ModelConfig) -> dict[str, Place]:
    path = ("params", "mtp")
    names = {
        "enorm": ("embed_norm", "scale"),
        "hnorm": ("hidden_norm", "scale"),
        "eh_proj": ("projection", "kernel"),
        "shared_head.norm": ("final_norm", "scale"),
    }
    places = {f"{prefix}.{name}.weight": Place((*path, *leaf), (k,)) for name, leaf in names.items()}
    places |= _layer_places(prefix, (*path, "block"), k, model)
    return places | _moe_places(prefix, (*path, "block"), ("router_bias", "mtp"), k, model)
