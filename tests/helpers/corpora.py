"""A corpus of many documents."""

from __future__ import annotations

from tests.helpers.settings import TINYSHAKESPEARE

FILES = 6


def speeches() -> list[str]:
    """7,222 documents, some of them alike."""
    return TINYSHAKESPEARE.read_text().split("\n\n")
