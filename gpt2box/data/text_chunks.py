"""Split a text into chunks, at places that no token of GPT-2's pattern crosses."""

import re
from collections.abc import Iterable, Iterator

CHUNK_CHARACTERS = 1 << 20  # characters given to a tokenizer at a time, and about what tiktoken's regex engine bears
# Where a token never crosses, by the pattern of GPT-2's pre-tokenizer: before a single space or line feed between
# others, between a letter and a digit, and between an ideograph or kana and a full-width mark.
SAFE_CUT = re.compile(
    r"(?<=\S)(?=[ \n]\S)|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fbb])(?=[\u3001\u3002\uff01\uff0c\uff1f])"
)


def split_into_chunks(parts: Iterable[str]) -> Iterator[str]:
    """Yield the text in chunks of about CHUNK_CHARACTERS, longer if there is no safe place to cut."""
    held, searched = "", 0
    for part in parts:
        held += part
        begin = 0
        while len(held) - begin > CHUNK_CHARACTERS:
            cut = SAFE_CUT.search(held, max(begin + CHUNK_CHARACTERS // 2, searched))
            if cut is None:
                searched = len(held) - 1  # what follows may make its last place a good one
                break
            yield held[begin : cut.start()]
            begin = cut.start()
        held, searched = held[begin:], max(searched - begin, 0)
    if held:
        yield held
