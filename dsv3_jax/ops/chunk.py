"""How many tokens' logits exist at a time, also for those who plan without jax."""

_LOGITS = 2**27
"""Half a GiB of float32."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits take half a GiB: few enough to fit beside a model, many enough that the float32 gradient of
    the head, which every chunk reads and writes, takes less time than the products."""
    return max(1, _LOGITS // vocab_size // 128 * 128)
