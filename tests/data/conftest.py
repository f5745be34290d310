import json

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.sources import open_source
from dsv3_jax.data.tokenizer import load_or_train


def _document(i):
    return f"def add_{i}(x, y):\n    # héllo {i}\n    return ((x + y) * {i}, [{i}])\n\n\nprint(add_{i}(1, 2))\n" * (
        i % 5 + 1
    )


@pytest.fixture(scope="session")
def documents():
    return [_document(i) for i in range(60)]


@pytest.fixture(scope="session")
def data(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "documents.jsonl").write_text(lines)
    return DataConfig(
        source=str(folder / "documents.jsonl"),
        cache_dir=str(folder / "cache"),
        fim_rate=0.5,
        split_rate=0.3,
        validation_share=0.2,
        shuffle_rows=1,
    )


@pytest.fixture(scope="session")
def source(data):
    return open_source(data)


@pytest.fixture(scope="session")
def tokenizer(data, source):
    return load_or_train(data, source, 400)
