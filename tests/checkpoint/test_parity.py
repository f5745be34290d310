"""The model computes what an independent implementation (PyTorch, float32, CPU) computes on the same weights.

Tolerances are float32's: logits and hidden states are of order 1 to 10, sums of a few hundred terms in another order.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv3_jax
from dsv3_jax.checkpoint.huggingface_layout import leaf_at, tensor_places
from dsv3_jax.checkpoint.pretrained import PretrainedModel
from dsv3_jax.inference.generate import generate
from dsv3_jax.model.moe import LocalExchange
from dsv3_jax.train.loss import LossWeights, training_loss

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CASES = sorted(folder.name for folder in REFERENCE.iterdir() if (folder / "reference.npz").exists())


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = REFERENCE / request.param
    return dsv3_jax.load_pretrained(folder, dtype=jnp.float32), dict(np.load(folder / "reference.npz"))


def assert_forward_agrees(pretrained: PretrainedModel, reference: dict[str, np.ndarray]) -> None:
    output = pretrained.apply(reference["input_ids"])
    np.testing.assert_allclose(output.logits, reference["logits"], atol=5e-5, rtol=0)
    assert len(output.hidden_states) == pretrained.config.num_layers + 1
    for i, hidden in enumerate(output.hidden_states):
        np.testing.assert_allclose(hidden, reference[f"hidden_states.{i}"], atol=5e-5, rtol=0)
    assert len(output.mtp_logits) == pretrained.config.num_mtp_modules
    for k, logits in enumerate(output.mtp_logits):
        np.testing.assert_allclose(logits, reference[f"mtp_logits.{k}"], atol=5e-5, rtol=0)
    first = pretrained.config.num_dense_layers
    for i, (experts, weights) in enumerate(zip(output.selected_experts, output.expert_weights, strict=True)):
        np.testing.assert_array_equal(experts, reference[f"topk_indices.{i + first}"])
        np.testing.assert_allclose(weights, reference[f"topk_weights.{i + first}"], atol=5e-5, rtol=0)


def assert_gradients_agree(pretrained: PretrainedModel, reference: dict[str, np.ndarray]) -> None:
    none = LossWeights(jnp.float32(0), jnp.float32(0), jnp.float32(0))

    def loss(params):
        model = nnx.merge(pretrained.graphdef, params)
        tokens = jnp.asarray(reference["input_ids"], jnp.int32)
        return training_loss(model, tokens, pretrained.router_bias, none, LocalExchange(), "report")[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(pretrained.params)
    assert abs(float(value) - float(reference["loss"])) < 1e-5
    norms = gradient_norms(pretrained, grads)
    named = {name.removeprefix("grad_norm.") for name in reference if name.startswith("grad_norm.")}
    assert named
    for name in named:
        np.testing.assert_allclose(norms[name], reference[f"grad_norm.{name}"], rtol=1e-3, err_msg=name)


def gradient_norms(pretrained: PretrainedModel, grads: dict) -> dict[str, float]:
    """Norms by the public checkpoint's names, routed experts fused by layer."""
    squares: dict[str, float] = {}
    for name, place in tensor_places(pretrained.config).items():
        if place.path[0] != "params":
            continue
        part = np.asarray(place.view(np.asarray(leaf_at({"params": grads}, place.path))), np.float64)
        key = name
        if ".experts." in name:
            layer, projection = name.split(".experts.")[0], name.split(".")[-2]
            key = f"{layer}.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
        squares[key] = squares.get(key, 0.0) + float((part**2).sum())
    return {name: square**0.5 for name, square in squares.items()}


def assert_greedy_agrees(pretrained: PretrainedModel, reference: dict[str, np.ndarray]) -> None:
    prompt, expected = reference["greedy"][:, :16], reference["greedy"]
    tokens = generate(pretrained, prompt, new_tokens=expected.shape[1] - 16)
    np.testing.assert_array_equal(tokens, expected)


def test_logits_hidden_states_and_routing_agree_with_the_reference(case):
    assert_forward_agrees(*case)


def test_loss_and_every_gradient_norm_agree_with_the_reference(case):
    assert_gradients_agree(*case)


def test_greedy_decoding_from_the_latent_cache_gives_the_reference_tokens(case):
    assert_greedy_agrees(*case)
