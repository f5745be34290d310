"""Autoregressive generation from the latent cache (report 3.4)."""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import LatentCache
from dsv3_jax.model.transformer import RouterBias
from dsv3_jax.ops.linear import linear
from dsv3_jax.ops.weights import Params


class ModelWeights(Protocol):
    """What generation needs of a model: `PretrainedModel` has it."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    router_bias: RouterBias


def generate(
    model: ModelWeights,
    prompt: Int[np.ndarray, "batch prompt"],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> Int[np.ndarray, "batch length"]:
    """The prompt continued by at most `new_tokens` tokens; temperature 0 takes the likeliest token.

    With `stop_token`, ends once every row has produced it; a row repeats it after its first. Raises ValueError for an
    empty prompt, tokens outside the vocabulary, or a length above `max_length`.
    """
    tokens = np.asarray(prompt, np.int32)
    _check(tokens, new_tokens, temperature, model.config)
    if new_tokens == 0:
        return tokens
    length = tokens.shape[1] + new_tokens
    caches = nnx.merge(model.graphdef, model.params).empty_caches(len(tokens), length, _activation_dtype(model.params))
    keys = jax.random.split(jax.random.key(seed), new_tokens)
    rows, new, finished = [tokens], tokens, np.zeros(len(tokens), bool)
    for key in keys:
        start = np.int32(sum(row.shape[1] for row in rows) - new.shape[1])
        logits, caches = _next_logits(model.graphdef, model.params, model.router_bias, new, caches, start)
        new = _sample(logits, temperature, key)
        if stop_token is not None:
            new = np.where(finished[:, None], np.int32(stop_token), new)
            finished |= new[:, 0] == stop_token
        rows.append(new)
        if stop_token is not None and finished.all():
            break
    return np.concatenate(rows, axis=1)


def _check(tokens: Int[np.ndarray, "batch prompt"], new_tokens: int, temperature: float, config: ModelConfig) -> None:
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"the prompt has shape {tokens.shape}: give at least one token, as [batch, prompt]")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(f"prompt tokens must lie between 0 and {config.vocab_size - 1}, the vocabulary of the model")
    if new_tokens < 0:
        raise ValueError(f"new_tokens={new_tokens}: cannot be negative")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: cannot be negative")
    if tokens.shape[1] + new_tokens > config.max_length:
        raise ValueError(
            f"{tokens.shape[1]} prompt tokens and {new_tokens} new ones exceed model.max_length={config.max_length}: "
            "shorten the prompt or ask for fewer tokens"
        )


def _activation_dtype(params: Params) -> jnp.dtype:
    return params["embed"]["embedding"].dtype


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _next_logits(
    graphdef: nnx.GraphDef,
    params: Params,
    router_bias: RouterBias,
    tokens: Int[Array, "batch new"],
    caches: dict[str, LatentCache],
    start: Int[Array, ""],
) -> tuple[Float[Array, "batch vocab"], dict[str, LatentCache]]:
    model = nnx.merge(graphdef, params)
    hidden, caches = model.decode(tokens, caches, start, router_bias)
    return linear(hidden[:, -1], model.head.kernel.get_value()).astype(jnp.float32), caches


def _sample(logits: Float[Array, "batch vocab"], temperature: float, key: Array) -> Int[Array, "batch 1"]:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature)[:, None].astype(jnp.int32)
