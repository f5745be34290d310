"""Tokens of a run whose batch grows."""

from dsv3_jax.config import BatchConfig


def sequences_at(batch: BatchConfig, tokens: int) -> int:
    """Sequences of the step that starts after `tokens` tokens: linear from `start_sequences` to `sequences` over
    `ramp_tokens`, rounded down to whole microbatches (report 4.2).
    """
    if batch.start_sequences is None or tokens >= batch.ramp_tokens:
        return batch.sequences
    grown = (batch.sequences - batch.start_sequences) * tokens / batch.ramp_tokens
    return batch.start_sequences + int(grown // batch.rows_per_microbatch) * batch.rows_per_microbatch


def tokens_after(batch: BatchConfig, steps: int) -> int:
    """Tokens that the first `steps` optimizer steps take."""
    tokens = taken = 0
    while taken < steps and (sequences := sequences_at(batch, tokens)) < batch.sequences:
        tokens, taken = tokens + sequences * batch.seq_len, taken + 1
    return tokens + (steps - taken) * batch.sequences * batch.seq_len
