"""The training loss: next token, MTP and balance (report 2.1.2, 2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.model.moe import Exchange
from dsv3_jax.model.transformer import MTPOutput, Recompute, RouterBias, Transformer, TrunkOutput
from dsv3_jax.ops.cross_entropy import CrossEntropy, chunked_cross_entropy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossWeights:
    """Factors of the losses beside the next-token one, at this point of the schedule."""

    mtp: Float[Array, ""]
    sequence_balance: Float[Array, ""]
    batch_balance: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossReport:
    """What one device saw of one microbatch: means over its share, sums for `load` and `overflow`.

    Balance losses are summed over layers, those of the MTP modules included, and unweighted.
    """

    loss: Float[Array, ""]
    mtp_loss: Float[Array, " depths"]
    mtp_accuracy: Float[Array, " depths"]
    sequence_balance: Float[Array, ""]
    batch_balance: Float[Array, ""]
    load: dict[str, Int[Array, "layers experts"]]
    overflow: Int[Array, ""]


def training_loss(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    router_bias: RouterBias,
    weights: LossWeights,
    exchange: Exchange,
    recompute: Recompute = "none",
    unroll_layers: int = 1,
    logits_tokens: int | None = None,
) -> tuple[Float[Array, ""], LossReport]:
    """The scalar to differentiate, as this device's mean, and its parts. In nats a token.

    Every sequence predicts its tokens from the second on; MTP depth k those from the (k + 3)rd on. Logits of at most
    `logits_tokens` tokens exist at a time; None is the default of `chunked_cross_entropy`.
    """
    how = recompute, unroll_layers, logits_tokens
    return training_losses(model, [tokens], router_bias, weights, exchange, *how)


def training_losses(
    model: Transformer,
    streams: Sequence[Int[Array, "batch seq"]],
    router_bias: RouterBias,
    weights: LossWeights,
    exchange: Exchange,
    recompute: Recompute = "none",
    unroll_layers: int = 1,
    logits_tokens: int | None = None,
) -> tuple[Float[Array, ""], LossReport]:
    """The sums of `training_loss` over microbatches that pass the layers side by side; see `Transformer.trunks`."""
    trunks = model.trunks(streams, router_bias, exchange, recompute, unroll_layers)
    return losses_of(model, streams, trunks, router_bias, weights, exchange, recompute, logits_tokens)


def losses_of(
    model: Transformer,
    streams: Sequence[Int[Array, "batch seq"]],
    trunks: Sequence[TrunkOutput],
    router_bias: RouterBias,
    weights: LossWeights,
    exchange: Exchange,
    recompute: Recompute = "none",
    logits_tokens: int | None = None,
) -> tuple[Float[Array, ""], LossReport]:
    """`training_losses` from the trunks' outputs on; balance losses are those of the statistics that they have."""
    aheads = [None] * len(trunks)
    if model.config.num_mtp_modules:
        aheads = model.predict_ahead_all(trunks, router_bias, exchange, recompute)
    losses = [_loss(model, *parts, weights, logits_tokens) for parts in zip(streams, trunks, aheads, strict=True)]
    return jax.tree.map(lambda *parts: sum(parts), *losses)


def _loss(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    trunk: TrunkOutput,
    ahead: MTPOutput | None,
    weights: LossWeights,
    logits_tokens: int | None,
) -> tuple[Float[Array, ""], LossReport]:
    loss, _ = _next_token_loss(model, trunk.hidden, tokens, 1, logits_tokens)
    report = _report(model, loss, trunk, ahead, tokens, logits_tokens)
    total = (
        loss
        + weights.mtp * (report.mtp_loss.mean() if ahead is not None else 0)
        + weights.sequence_balance * report.sequence_balance
        + weights.batch_balance * report.batch_balance
    )
    return total, report


def held_out_loss(
    model: Transformer,
    tokens: Int[Array, "batch seq"],
    row_weights: Float[Array, " batch"],
    router_bias: RouterBias,
    exchange: Exchange,
) -> Float[Array, ""]:
    """Weighted sum over this device's rows of each row's mean next-token loss, in nats."""
    return held_out_loss_of(model, model.trunk(tokens, router_bias, exchange).hidden, tokens, row_weights)


def held_out_loss_of(
    model: Transformer,
    hidden: Float[Array, "batch seq d_model"],
    tokens: Int[Array, "batch seq"],
    row_weights: Float[Array, " batch"],
) -> Float[Array, ""]:
    """`held_out_loss` from the trunk's output on."""
    return _predict(model, hidden, tokens, 1, row_weights).loss / (tokens.shape[1] - 1)


def _next_token_loss(
    model: Transformer,
    hidden: Float[Array, "batch seq d_model"],
    tokens: Int[Array, "batch seq"],
    distance: int,
    logits_tokens: int | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean loss, and accuracy, of predicting the token `distance` ahead, where the sequence has one."""
    sums = _predict(model, hidden, tokens, distance, jnp.ones(len(tokens), jnp.float32), logits_tokens)
    count = len(tokens) * (tokens.shape[1] - distance)
    return sums.loss / count, sums.correct / count


def _predict(
    model: Transformer,
    hidden: Float[Array, "batch seq d_model"],
    tokens: Int[Array, "batch seq"],
    distance: int,
    row_weights: Float[Array, " batch"],
    logits_tokens: int | None = None,
) -> CrossEntropy:
    """Sums over the rows of predicting the token `distance` ahead."""
    batch, seq = tokens.shape
    labels = jnp.roll(tokens, -distance, axis=1)
    weights = jnp.where(jnp.arange(seq) < seq - distance, row_weights[:, None], 0)
    rows, head = hidden.reshape(batch * seq, -1), model.head.kernel.get_value()
    return chunked_cross_entropy(rows, head, labels.reshape(-1), weights.reshape(-1), logits_tokens)


def _report(
    model: Transformer,
    loss: Float[Array, ""],
    trunk: TrunkOutput,
    ahead: MTPOutput | None,
    tokens: Int[Array, "batch seq"],
    logits_tokens: int | None,
) -> LossReport:
    stats = {"moe_layers": trunk.stats, "mtp": ahead.stats if ahead is not None else None}
    stats = {kind: value for kind, value in stats.items() if value is not None}
    depths = [_next_token_loss(model, hidden, tokens, k + 2, logits_tokens) for k, hidden in enumerate(_depths(ahead))]
    return LossReport(
        loss=loss,
        mtp_loss=jnp.array([loss for loss, _ in depths]),
        mtp_accuracy=jnp.array([accuracy for _, accuracy in depths]),
        sequence_balance=sum(s.sequence_balance.sum() for s in stats.values()),
        batch_balance=sum(s.batch_balance.sum() for s in stats.values()),
        load={kind: s.load for kind, s in stats.items()},
        overflow=sum(s.overflow.sum() for s in stats.values()),
    )


def _depths(ahead: MTPOutput | None) -> list[Float[Array, "batch seq d_model"]]:
    return [] if ahead is None else [ahead.hidden[k] for k in range(ahead.hidden.shape[0])]
