"""Where the tokens of a run come from: the same documents and tokenizer in every process, and each its own streams."""

from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data.pipeline import TrainRows, train_rows, validation_rows
from dsv3_jax.data.sources import Source, open_source
from dsv3_jax.data.tokenizer import Tokenizer, load_or_train
from dsv3_jax.parallel.agreement import all_processes
from dsv3_jax.train.batches import Streams, open_streams


@dataclass(frozen=True)
class Text:
    """Where the tokens of a run come from."""

    source: Source
    tokenizer: Tokenizer
    streams: Streams
    validation: Int[np.ndarray, "rows seq"]
    validation_bytes: int


def open_text(config: Config, mesh: Mesh, saved_streams: int | None = None) -> Text:
    """Source, tokenizer, the streams that this process reads, and the held-out rows.

    `saved_streams` is how many a resumed run had. Raises ConfigError where the processes do not find the same data.
    """
    source = open_source(config.data)
    tokenizer = _open_tokenizer(config, source)
    validation, num_bytes = validation_rows(
        config.data, source, tokenizer, seq_len=config.batch.seq_len, count=config.log.validation_rows
    )
    streams = open_streams(
        partial(open_stream, config, source, tokenizer), config.batch, mesh, config.data.streams or saved_streams
    )
    if jax.process_index() == 0:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.bpe.save(str(folder / "tokenizer.json"))
    return Text(source, tokenizer, streams, validation, num_bytes)


def open_stream(config: Config, source: Source, tokenizer: Tokenizer, number: int, count: int) -> TrainRows:
    """A stream of rows, from its start."""
    return train_rows(
        config.data,
        source,
        tokenizer,
        seq_len=config.batch.seq_len,
        seed=config.seed,
        stream=number,
        streams=count,
    )


def _open_tokenizer(config: Config, source: Source) -> Tokenizer:
    """Process 0 comes first, and leaves one that it has trained in the cache."""
    load = partial(load_or_train, config.data, source, config.model.vocab_size)
    opened = load() if jax.process_index() == 0 else None
    all_processes("process 0 is ready")
    opened = opened or load()
    found = all_processes([len(source), blake2b(opened.bpe.to_str().encode(), digest_size=16).hexdigest()])
    for process, (documents, digest) in enumerate(found):
        if [documents, digest] != found[0]:
            raise ConfigError(
                f"data.source={config.data.source!r}: process {process} finds {documents} documents and tokenizer "
                f"{digest}, process 0 {found[0][0]} and {found[0][1]}: give all hosts the same files"
            )
    return opened
