"""From documents to rows of tokens: shuffle, FIM, splitting, packing (report 4.1)."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.fim import apply_fim
from dsv3_jax.data.packing import PackRows
from dsv3_jax.data.sources import Source, is_held_out, spread
from dsv3_jax.data.splitting import Splits, find_splits, split_tokens
from dsv3_jax.data.tokenizer import Tokenizer

# Documents are read and tokenized ahead; the state is that of the rows delivered.
READ_AHEAD = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
# What a stream of rows depends on, as the user names it.
_SETTINGS = {
    "seq_len": "batch.seq_len",
    "shuffle_rows": "data.shuffle_rows",
    "streams": "data.streams",
    "documents": "number of documents in data.source",
    "vocab_size": "size of data.tokenizer",
}


def document_tokens(
    text: str, data: DataConfig, tokenizer: Tokenizer, splits: Splits, rng: np.random.Generator
) -> Int32[np.ndarray, " tokens"]:
    """One document as it is trained on: rearranged by FIM at `data.fim_rate`, its merged punctuation split at
    `data.split_rate` (`splits` from `find_splits`), and `<|eos|>` at the end."""
    ids = apply_fim(text, tokenizer, rng) if rng.random() < data.fim_rate else tokenizer.encode(text)
    ids = np.asarray([*ids, tokenizer.eos], np.int32)
    return split_tokens(ids, splits, data.split_rate, rng)


class TrainRows(Iterator[Int32[np.ndarray, " seq"]]):
    """Rows of tokens whose place can be saved and restored exactly."""

    def __init__(self, rows: grain.DatasetIterator, stream: dict[str, int]):
        self._rows, self._stream = rows, stream

    def __next__(self) -> Int32[np.ndarray, " seq"]:
        return next(self._rows)

    def get_state(self) -> dict[str, Any]:
        """A small JSON object: the place after the last row delivered, and which stream it belongs to."""
        return {"stream": self._stream, "place": self._rows.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; raises ConfigError if it was taken from another stream of rows."""
        changed = [name for name, value in self._stream.items() if state["stream"].get(name) != value]
        if changed:
            then, now = (
                {_SETTINGS.get(name, name): stream.get(name) for name in changed}
                for stream in (state["stream"], self._stream)
            )
            raise ConfigError(
                f"the place in the data was saved with {then} and means nothing with {now}: keep what it was saved "
                "with, or start anew in another output_dir"
            )
        self._rows.set_state(state["place"])


def train_rows(
    data: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    seed: int,
    stream: int = 0,
    streams: int = 1,
    epochs: int | None = None,
) -> TrainRows:
    """Int32 rows of `seq_len` tokens of the training documents, as one of so many streams; endless without `epochs`.

    Each epoch shuffles all documents anew; a stream takes every `streams`-th of them, packs them without loss
    and lets the end of an epoch flow into the next. Rows are then shuffled within windows. FIM and splitting depend on
    seed, epoch and document alone.

    Raises:
        ConfigError: the seed is out of range, or this stream has no document to train on.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must lie between 0 and 2**32 - 1")
    splits = find_splits(tokenizer)

    def tokens(text: str, rng: np.random.Generator) -> Int32[np.ndarray, " tokens"] | None:
        if is_held_out(text, data.validation_share):
            return None
        return document_tokens(text, data, tokenizer, splits, rng)

    documents = grain.MapDataset.source(source).random_map(tokens, seed=seed).shuffle(seed=seed)
    documents = documents[stream::streams]
    if all(documents[i] is None for i in range(len(documents))):
        raise ConfigError(
            f"data.source={data.source!r}: stream {stream} of {streams} finds nothing to train on among "
            f"{len(source)} documents ({len(source.bad_documents)} are bad); give more, or lower data.streams or "
            "data.validation_share"
        )
    rows = PackRows(documents.repeat(epochs).to_iter_dataset(READ_AHEAD), seq_len)
    if data.shuffle_rows > 1:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=data.shuffle_rows, seed=seed)
    # A thread fills the next window while the devices train on this one; the state is still that of the rows delivered.
    rows = grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=data.shuffle_rows)
    origin = {
        "seq_len": seq_len,
        "seed": seed,
        "shuffle_rows": data.shuffle_rows,
        "stream": stream,
        "streams": streams,
        "documents": len(source),
        "vocab_size": tokenizer.vocab_size,
    }
    return TrainRows(iter(rows), origin)


def validation_rows(
    data: DataConfig, source: Source, tokenizer: Tokenizer, *, seq_len: int, count: int
) -> tuple[Int32[np.ndarray, "rows seq"], int]:
    """Held-out rows, and the UTF-8 bytes of the tokens predicted in them (all but the first of each row).

    No FIM and no splitting; the same for every seed. There are `count` rows, or as many whole rows as the held-out
    documents fill. Bits per byte = mean loss in nats * rows * (seq_len - 1) / ln 2 / bytes.

    Raises:
        ConfigError: the held-out documents do not fill one row.
    """
    pieces, size = [], 0
    for text in spread(source, lambda text: is_held_out(text, data.validation_share)):
        pieces += tokenizer.encode(text), [tokenizer.eos]
        size += len(pieces[-2]) + 1
        if size >= count * seq_len:
            break
    rows = min(count, size // seq_len)
    if not rows:
        raise ConfigError(
            f"data.validation_share={data.validation_share}: the held-out documents have {size} tokens and a row "
            f"takes {seq_len}; raise data.validation_share, or give more documents"
        )
    tokens = np.concatenate(pieces).astype(np.int32)[: rows * seq_len].reshape(rows, seq_len)
    return tokens, tokenizer.num_bytes(tokens[:, 1:])
