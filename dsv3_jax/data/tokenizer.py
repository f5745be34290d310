"""Byte-level BPE: trained on the run's own documents, or loaded from a tokenizer.json (report 4.1)."""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int, Int32
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.sources import Source, is_held_out, spread

logger = logging.getLogger(__name__)

# Each of our special tokens, and DeepSeek's spelling of it (fullwidth bars, U+2581 between words).
SPECIAL_TOKENS = {
    "eos": ("<|eos|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    "fim_begin": ("<|fim_begin|>", "<\uff5cfim\u2581begin\uff5c>"),
    "fim_hole": ("<|fim_hole|>", "<\uff5cfim\u2581hole\uff5c>"),
    "fim_end": ("<|fim_end|>", "<\uff5cfim\u2581end\uff5c>"),
}
# A word with the character before it; up to 3 digits; punctuation with the newlines after it; blank lines with their
# indentation; spaces, of which the last goes to the next word.
PRE_TOKENS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SAMPLE_BYTES = 32 << 20
_BYTES = 256


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE with the special tokens that documents and FIM need. Every text round-trips exactly."""

    bpe: tokenizers.Tokenizer
    eos: int
    """Ends every document."""
    fim_begin: int
    fim_hole: int
    fim_end: int
    byte_lengths: Int32[np.ndarray, " vocab"]
    """UTF-8 bytes each token stands for; 0 for special tokens."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self.byte_lengths)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. A special token spelled out in the text is text, never the special token."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, without special ones; bytes that are not UTF-8 become U+FFFD."""
        return self.bpe.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def num_bytes(self, ids: Int[np.ndarray, "..."]) -> int:
        """UTF-8 bytes that the tokens stand for."""
        return int(self.byte_lengths[ids].sum())


def load_or_train(data: DataConfig, source: Source, vocab_size: int) -> Tokenizer:
    """The tokenizer of a run, whose ids are below `vocab_size` (the model's).

    Loads `data.tokenizer`, or trains on a sample of at most 32 MiB of the training documents and keeps the result in
    `data.cache_dir` under a hash of the sample and the settings; a cache file that does not read is trained again.

    Raises:
        ConfigError: the file does not read, is not byte-level, lacks a special token, or has more tokens than the
            model; or there is nothing to train on.
    """
    if data.tokenizer is not None:
        return load_tokenizer(data.tokenizer, vocab_size)
    smallest = _BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(f"model.vocab_size={vocab_size}: byte-level BPE needs at least {smallest} tokens")
    sample = _sample(data, source)
    if not sample:
        raise ConfigError(
            f"data.source={data.source!r}: none of its {len(source)} documents can be trained on "
            f"({len(source.bad_documents)} are bad); give more, or lower data.validation_share"
        )
    path = Path(data.cache_dir).expanduser() / f"bpe-{vocab_size}-{_fingerprint(sample)}.json"
    if path.exists():
        try:
            return load_tokenizer(str(path), vocab_size)
        except ConfigError as error:
            logger.warning("training the tokenizer again: %s", error)
    bpe = train_bpe(sample, vocab_size)
    _write(path, bpe.to_str())
    return _wrap(bpe, str(path), vocab_size)


def load_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer.json, ours or DeepSeek's; raises ConfigError where it cannot be used."""
    try:
        bpe = tokenizers.Tokenizer.from_file(str(Path(path).expanduser()))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"data.tokenizer={path!r}: does not read as a tokenizer.json ({error})") from error
    return _wrap(bpe, path, vocab_size)


def train_bpe(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the special ones first."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ours for ours, _ in SPECIAL_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _sample(data: DataConfig, source: Source) -> list[str]:
    sample, size = [], 0
    for text in spread(source, lambda text: not is_held_out(text, data.validation_share)):
        sample.append(text[: SAMPLE_BYTES - size])
        size += len(sample[-1].encode())
        if size >= SAMPLE_BYTES:
            break
    return sample


def _fingerprint(sample: Sequence[str]) -> str:
    digest = blake2b(digest_size=16)
    settings = [PRE_TOKENS, tokenizers.__version__, *chain(*SPECIAL_TOKENS.values())]
    for text in chain(settings, sample):
        content = text.encode()
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def _write(path: Path, content: str) -> None:
    """Whole or not at all: several processes may train the same tokenizer."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_text(content, encoding="utf-8")
            os.replace(whole, path)
    except OSError as error:
        logger.warning("the tokenizer is not kept (%s): set data.cache_dir to a folder that can be written", error)


def _wrap(bpe: tokenizers.Tokenizer, name: str, vocab_size: int) -> Tokenizer:
    if "ByteLevel" not in json.dumps(json.loads(bpe.to_str())["decoder"]):
        raise ConfigError(f"data.tokenizer={name!r}: is not byte-level; give a byte-level BPE")
    special = {role: _special_id(bpe, role, name) for role in SPECIAL_TOKENS}
    # DeepSeek's file marks the FIM tokens as ordinary ones, which would be found inside documents.
    bpe.add_special_tokens([AddedToken(bpe.id_to_token(i), special=True, normalized=False) for i in special.values()])
    bpe.encode_special_tokens = True
    lengths = _byte_lengths(bpe)
    if len(lengths) > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: data.tokenizer={name!r} has more tokens; "
            f"raise model.vocab_size to at least {len(lengths)}"
        )
    return Tokenizer(bpe, **special, byte_lengths=lengths)


def _special_id(bpe: tokenizers.Tokenizer, role: str, name: str) -> int:
    spellings = SPECIAL_TOKENS[role]
    found = next((i for i in map(bpe.token_to_id, spellings) if i is not None), None)
    if found is None:
        raise ConfigError(f"data.tokenizer={name!r}: has no token {' or '.join(spellings)}; add one to the file")
    return found


def _byte_lengths(bpe: tokenizers.Tokenizer) -> Int32[np.ndarray, " vocab"]:
    vocab = bpe.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocab.values()) + 1, np.int32)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for token, i in vocab.items():
        # Byte-level spells every byte as one character; added tokens may be spelled as plain text.
        lengths[i] = len(token) if alphabet.issuperset(token) else len(token.encode())
    lengths[[i for i, token in bpe.get_added_tokens_decoder().items() if token.special]] = 0
    return lengths
