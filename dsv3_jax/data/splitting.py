"""Random splitting of tokens that merge punctuation with line breaks or other punctuation (report 4.1).

A prompt that ends in the middle of such a token would otherwise meet a token boundary the model never saw.
"""

import unicodedata

import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.tokenizer import Tokenizer

Splits = dict[int, list[list[int]]]
"""For each merged token, the tokens that may stand in its place: one entry for each place it can be cut."""


def find_splits(tokenizer: Tokenizer) -> Splits:
    """The ways to split each merged token in two: a space at most, then two or more characters of which the first is
    punctuation or a symbol and the others too, or line breaks. Cuts lie between those characters."""
    texts = tokenizer.bpe.decode_batch([[i] for i in range(tokenizer.vocab_size)], skip_special_tokens=True)
    return {i: [_cut(tokenizer, text, at) for at in _places(text)] for i, text in enumerate(texts) if _places(text)}


def split_tokens(
    ids: Int32[np.ndarray, " tokens"], splits: Splits, rate: float, rng: np.random.Generator
) -> Int32[np.ndarray, " longer"]:
    """The tokens, each merged one replaced with probability `rate` by one of its splits. The text stays the same."""
    merged = np.isin(ids, np.fromiter(splits, np.int32, len(splits)))
    places = np.flatnonzero(merged)
    places = places[rng.random(len(places)) < rate]
    pieces, done = [], 0
    for place in places:
        ways = splits[int(ids[place])]
        pieces += [ids[done:place], ways[rng.integers(len(ways))]]
        done = place + 1
    return np.concatenate([*pieces, ids[done:]]).astype(np.int32)


def _places(text: str) -> range:
    start = int(text.startswith(" "))
    body = text[start:]
    mergeable = len(body) > 1 and _is_punctuation(body[0]) and all(c in "\r\n" or _is_punctuation(c) for c in body)
    return range(start + 1, len(text)) if mergeable else range(0)


def _is_punctuation(character: str) -> bool:
    # U+FFFD stands for bytes that are only part of a character, which cannot be cut out as text.
    return unicodedata.category(character)[0] in "PS" and character != "\ufffd"


def _cut(tokenizer: Tokenizer, text: str, at: int) -> list[int]:
    return tokenizer.encode(text[:at]) + tokenizer.encode(text[at:])
