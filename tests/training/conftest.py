"""A small body of code-like text and a tokenizer trained on it, shared by the tests of the data pipeline."""

import pytest
from tokenizers import Tokenizer

from dsv3_jax.config import DataConfig
from dsv3_jax.training.tokenizer import Vocabulary, train_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Sixty different documents of 1 to 25 lines."""
    return [f"# naïve 漢字 🙂 {i}\n" + "".join(f"def f{j}(x):\n    return [x, {i * j}];\n\n" for j in range(i % 9)) for i in range(60)]


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> Tokenizer:
    return train_tokenizer(documents, 320)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary.from_tokenizer(tokenizer, DataConfig())
