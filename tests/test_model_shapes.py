"""The shapes that are planned by are those that the model declares."""

import dataclasses
import runpy
from pathlib import Path

import jax
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import initial_router_bias
from dsv3_jax.model_shapes import leaf_shapes, tree_shapes
from dsv3_jax.train.state import model_structure

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
LEAN = ModelConfig(q_lora_rank=None, num_shared_experts=0, num_dense_layers=0, num_mtp_modules=0)
DENSE = dataclasses.replace(LEAN, num_dense_layers=LEAN.num_layers)


@pytest.mark.parametrize("source", [*CONFIGS, LEAN, DENSE], ids=lambda s: getattr(s, "stem", ""))
def test_every_array_has_the_shape_that_the_model_declares(source):
    model = runpy.run_path(str(source))["config"]().model if isinstance(source, Path) else source
    declared = {"params": model_structure(model)[1], "router_bias": jax.eval_shape(lambda: initial_router_bias(model))}
    found = {
        tuple(entry.key for entry in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(declared)
    }
    assert dict(leaf_shapes(tree_shapes(model))) == found
