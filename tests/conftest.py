from pathlib import Path

import pytest
from small import prepare_text


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A prepared directory of real text: 500 words, about 40,000 tokens, short documents."""
    return prepare_text(tmp_path_factory.mktemp("text"))
