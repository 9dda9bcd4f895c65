"""Tokenize text in bulk: GPT-2's ids with a faster library than tiktoken, others with their own tokenizer.

gigatoken (MIT, Rust) is some ten times as fast as tiktoken on a core. It knows a later Unicode than tiktoken, so that a
few thousand code points of recent scripts count as letters in one and not in the other: a text with anything
`UNSETTLED` goes to tiktoken. Where gigatoken is missing or fails its test at the start, everything does.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data import downloads, tokenizer
from gpt2box.data.hf_tokenizer import BpeTokenizer
from gpt2box.data.text_chunks import split_into_chunks
from gpt2box.data.tokenizer import Tokenizer, Tokens, load_gpt2_tokenizer
from gpt2box.errors import BadInput
from gpt2box.utils.paths import raw_dir
from gpt2box.utils.progress import log_line

# All but what has long been a letter, a digit, space or none of these: Latin, Greek, Cyrillic, punctuation and symbols,
# kana, ideographs, Hangul, full width, emoji.
UNICODE_DEPENDENT = re.compile(
    "[^\0-\u052f\u2000-\u2bff\u3000-\u30ff\u4e00-\u9ffc\uac00-\ud7a3\ufe30-\uffef\U0001f300-\U0001faff]"
)
GPT2 = "gpt2"
RENEW_BYTES = 1 << 28  # gigatoken remembers every word it meets
TEST = "It's 1984, isn't it?  Yes:\n\n\tHäuser, naïve Ωμέγα ПРИВЕТ ９９ 漢字かな 한글 “x”—y… 🙂👍🏽  \r\n'S 'll'  end "


class BulkEncoder:
    """Encode many texts; each process has one."""

    def __init__(self, source: Path) -> None:
        """`source`: GPT-2's ranks, or the folder of another tokenizer."""
        self.source = source
        self.tokenizer: Tokenizer = tokenizer.load_tokenizer(source) if source.is_dir() else load_gpt2_tokenizer(source)
        self.needs_full_text = isinstance(self.tokenizer, BpeTokenizer) and not self.tokenizer.splits_as_gpt2
        self.fast = None if source.is_dir() else self._fast()
        self._seen = 0
        if self.fast is not None and self.fast.encode(TEST).tolist() != self.tokenizer.encode(TEST).tolist():
            log_line("note: gigatoken and tiktoken differ here: going on with tiktoken alone, slower")
            self.fast = None

    def _fast(self) -> Any:
        try:
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError:
            return None
        return BPETokenizer.from_tiktoken(str(self.source), "gpt2", {})

    def encode(self, parts: Iterable[str]) -> Iterator[Tokens]:
        """Encode a text that comes in chunks; a special token's name is ordinary text.

        Raises BadInput: a run that tiktoken gives up on.
        """
        for piece in ("".join(parts),) if self.needs_full_text else split_into_chunks(parts):
            yield self._encode(piece)

    def _encode(self, text: str) -> Tokens:
        if self.fast is None or (not text.isascii() and UNICODE_DEPENDENT.search(text)):
            return self.tokenizer.encode(text)
        self._seen += len(text)
        if self._seen > RENEW_BYTES:
            self.fast, self._seen = self._fast(), 0
        ids: Tokens = self.fast.encode(text).astype(np.uint16)
        return ids


def resolve_source(asked: str) -> tuple[Path, Tokenizer]:
    """Return the path that BulkEncoder reads for gpt2 or a tokenizer's folder, and the tokenizer.

    Raises BadInput: nothing in its vocabulary ends a text.
    """
    source = downloads.fetch(downloads.GPT2_RANKS, raw_dir()) if asked == GPT2 else Path(asked)
    words = load_gpt2_tokenizer(source) if asked == GPT2 else tokenizer.load_tokenizer(source)
    if words.end_of_text is None:
        raise BadInput(f"{source}: no token ends a text", "an eos_token, as in tokenizer_config.json")
    return source, words
