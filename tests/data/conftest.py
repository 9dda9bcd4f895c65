"""A corpus of many documents in the Hub's layout."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.corpora import FILES, speeches


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speeches in the Hub's layout of OpenWebText."""
    folder, texts = tmp_path_factory.mktemp("corpus"), speeches()
    for index in range(FILES):
        table = pyarrow.table({"id": range(len(texts[index::FILES])), "text": texts[index::FILES]})
        path = folder / f"train-{index:05d}-of-{FILES:05d}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    return folder
