"""Text to GPT-2's token ids in bulk, with tiktoken's ids and a faster program's speed.

gigatoken (MIT, Rust) is some ten times as fast as tiktoken on a core. It knows a later Unicode than tiktoken, so that a
few thousand code points of recent scripts count as letters in one and not in the other: a text with anything
`UNSETTLED` goes to tiktoken. Where gigatoken is missing or fails its test at the start, everything does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data.tokenizer import Tokens, from_ranks
from gpt2box.progress import say

# All but what has long been a letter, a digit, space or none of these: Latin, Greek, Cyrillic, punctuation and symbols,
# kana, ideographs, Hangul, full width, emoji.
UNSETTLED = re.compile(
    "[^\0-\u052f\u2000-\u2bff\u3000-\u30ff\u4e00-\u9ffc\uac00-\ud7a3\ufe30-\uffef\U0001f300-\U0001faff]"
)
PIECE = 1 << 20  # characters given to a tokenizer at a time, and about what tiktoken's regex engine bears
# Where a token never crosses, by the pattern of GPT-2's pre-tokenizer: before a single space or line feed between
# others, between a letter and a digit, and between an ideograph or kana and a full-width mark.
SAFE_CUT = re.compile(
    r"(?<=\S)(?=[ \n]\S)|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fbb])(?=[\u3001\u3002\uff01\uff0c\uff1f])"
)
RENEW_BYTES = 1 << 28  # gigatoken remembers every word it meets
TEST = "It's 1984, isn't it?  Yes:\n\n\tHäuser, naïve Ωμέγα ПРИВЕТ ９９ 漢字かな 한글 “x”—y… 🙂👍🏽  \r\n'S 'll'  end "


class BulkEncoder:
    """Encodes many texts; one for each process."""

    def __init__(self, ranks: Path) -> None:
        self.ranks, self.tokenizer = ranks, from_ranks(ranks)
        self.fast = self._fast()
        self._seen = 0
        if self.fast is not None and self.fast.encode(TEST).tolist() != self.tokenizer.encode(TEST).tolist():
            say("note: gigatoken and tiktoken differ here: going on with tiktoken alone, slower")
            self.fast = None

    def _fast(self) -> Any:
        try:
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError:
            return None
        return BPETokenizer.from_tiktoken(str(self.ranks), "gpt2", {})

    def encode(self, parts: Iterable[str]) -> Iterator[Tokens]:
        """Token ids of a text that comes in parts; a special token's name is ordinary text.

        Raises:
            BadInput: a run that tiktoken gives up on.
        """
        for piece in pieces(parts):
            yield self._encode(piece)

    def _encode(self, text: str) -> Tokens:
        if self.fast is None or (not text.isascii() and UNSETTLED.search(text)):
            return self.tokenizer.encode(text)
        self._seen += len(text)
        if self._seen > RENEW_BYTES:
            self.fast, self._seen = self._fast(), 0
        ids: Tokens = self.fast.encode(text).astype(np.uint16)
        return ids


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of about PIECE, cut where no token crosses; longer where there is no such place."""
    held, searched = "", 0
    for part in parts:
        held += part
        begin = 0
        while len(held) - begin > PIECE:
            cut = SAFE_CUT.search(held, max(begin + PIECE // 2, searched))
            if cut is None:
                searched = len(held) - 1  # what follows may make its last place a good one
                break
            yield held[begin : cut.start()]
            begin = cut.start()
        held, searched = held[begin:], max(searched - begin, 0)
    if held:
        yield held
