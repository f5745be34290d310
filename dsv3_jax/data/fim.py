"""Fill-in-the-middle, prefix-suffix-middle order, at document level (report 4.1)."""

from collections.abc import Sequence

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer


def split_middle(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text, cut at two places uniform over its characters; parts may be empty.

    Characters, as the field does (arXiv 2207.14255), not tokens: a cursor stands inside words too, and a model whose
    holes all began and ended with a token would see there a tokenization that it never trained on.
    """
    first, second = np.sort(rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[first:second], text[second:]


def apply_fim(text: str, tokenizer: Tokenizer, rng: np.random.Generator) -> list[int]:
    """Tokens of `<|fim_begin|>prefix<|fim_hole|>suffix<|fim_end|>middle`, each part tokenized on its own."""
    prefix, middle, suffix = map(tokenizer.encode, split_middle(text, rng))
    return [tokenizer.fim_begin, *prefix, tokenizer.fim_hole, *suffix, tokenizer.fim_end, *middle]


def invert_fim(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of one document's tokens, rearranged or not.

    Raises:
        ValueError: the document starts with `<|fim_begin|>` and does not go on with one hole and one end.
    """
    ids = list(ids)
    if not ids or ids[0] != tokenizer.fim_begin:
        return tokenizer.decode(ids)
    hole, end = _only(ids, tokenizer.fim_hole, "hole"), _only(ids, tokenizer.fim_end, "end")
    if hole > end:
        raise ValueError(f"the FIM hole at {hole} stands after the FIM end at {end}: not prefix-suffix-middle order")
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
    return "".join(map(tokenizer.decode, (prefix, middle, suffix)))


def _only(ids: list[int], token: int, name: str) -> int:
    if ids.count(token) != 1:
        raise ValueError(f"found {ids.count(token)} FIM {name} tokens in a FIM document: give exactly one document")
    return ids.index(token)
