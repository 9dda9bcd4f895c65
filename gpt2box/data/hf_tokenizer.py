"""Byte-level BPE vocabularies other than GPT-2's own, as the files of a Hugging Face folder have them.

By the tokenizers library, which transformers encodes with, too. The files are kept as they are, so that a checkpoint's
`AutoTokenizer` gives the same ids. GPT-2's own vocabulary, which many models share, stays with tokenizer.py.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gpt2box.data.text_chunks import split_into_chunks
from gpt2box.data.tokenizer import END_OF_TEXT, Tokens, byte_alphabet, vocabulary_digest
from gpt2box.errors import BadInput, Damaged
from gpt2box.utils.files import read_json_object

FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
# With these, transformers takes add_prefix_space from tokenizer_config.json, whatever tokenizer.json says.
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_DIGEST = "140f02bb05c0d82c"
MAX_UNSPLIT_CHARACTERS = 1 << 16  # ids of a .bin file
EXPECTED = "byte-level BPE as GPT-2's: tokenizer.json, or vocab.json and merges.txt"


class BpeTokenizer:
    """The tokenizer whose files lie in a folder.

    Raises:
        BadInput: of another kind, or with more tokens than a .bin file has ids.
        Damaged: files that do not go together.
    """

    kind = "bpe"

    def __init__(self, folder: Path) -> None:
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        self._tokenizer = load_library_tokenizer(folder)
        self._tokenizer.encode_special_tokens = True  # their names in a text are ordinary text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self.vocabulary()
        self.vocab_size = max(ids.values(), default=-1) + 1
        if self.vocab_size > MAX_UNSPLIT_CHARACTERS:
            found = f"{folder}: a vocabulary of {self.vocab_size:,} tokens"
            raise BadInput(found, f"at most {MAX_UNSPLIT_CHARACTERS:,}: a token is stored in 16 bits")
        self.end_of_text: int | None = ids.get(find_end_of_text(folder))
        self._bytes = [b""] * self.vocab_size
        alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}
        for token, index in ids.items():
            plain = all(character in alphabet for character in token)
            self._bytes[index] = bytes(map(alphabet.__getitem__, token)) if plain else token.encode()
        self.added = self._tokenizer.get_added_tokens_decoder()
        for index, token in self.added.items():
            self._bytes[index] = token.content.encode()

    @property
    def splits_as_gpt2(self) -> bool:
        """Return True if the text is split by GPT-2's pattern, so that it can be cut where no token crosses."""
        before = json.loads(self._tokenizer.pre_tokenizer.__getstate__()) if self._tokenizer.pre_tokenizer else {}
        plain = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
        return bool(plain) and self._tokenizer.normalizer is None and all(t.special for t in self.added.values())

    def encode(self, text: str) -> Tokens:
        parts = split_into_chunks((text,)) if len(text) > MAX_UNSPLIT_CHARACTERS and self.splits_as_gpt2 else [text]
        return np.concatenate([self._encode(part) for part in parts])

    def _encode(self, text: str) -> Tokens:
        try:  # fast: without the place of each token in the text, half of the time
            found = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # half of a surrogate pair, which JSON can hold: as tiktoken has it
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            found = self._tokenizer.encode_batch_fast([whole], add_special_tokens=False)
        return np.array(found[0].ids, dtype=np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[index] for index in ids)

    def vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    def merges(self) -> list[str]:
        """Return the merges in order, as in merges.txt."""
        content = json.loads(self._tokenizer.to_str())["model"]["merges"]
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in content]

    def save(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def load_library_tokenizer(folder: Path) -> Any:
    """Build the library's Tokenizer from a folder's files, as transformers does.

    Raises BadInput, Damaged: see BpeTokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = read_json_object(folder / "tokenizer_config.json")
    prefix = bool(config.get("add_prefix_space", False))
    try:
        if (folder / "tokenizer.json").is_file():
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            content = json.loads(text)
            if content["model"]["type"] != "BPE" or (content["decoder"] or {}).get("type") != "ByteLevel":
                raise BadInput(
                    f"{folder}/tokenizer.json: a {content['model']['type']} tokenizer of another kind", EXPECTED
                )
            tokenizer = Tokenizer.from_str(text)
            tokenizer.model.dropout = None
            before = content.get("pre_tokenizer") or {}
            if config.get("tokenizer_class") in GPT2_CLASSES and before.get("type") == "ByteLevel":
                regex = before.get("use_regex", True)
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
            return tokenizer
        if not (folder / "merges.txt").is_file():
            raise BadInput(f"{folder}: vocab.json without merges.txt", EXPECTED)
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
        add_tokens(tokenizer, folder, config)
        return tokenizer
    except BadInput:
        raise
    except Exception as error:  # the library has no kind of its own
        raise Damaged(f"{folder}: the tokenizer's files are damaged ({error})", "files as they were written") from error


def add_tokens(tokenizer: Any, folder: Path, config: dict[str, Any]) -> None:
    """Add the tokens listed in added_tokens.json or tokenizer_config.json.

    Raises ValueError: their ids do not follow on the vocabulary's.
    """
    from tokenizers import AddedToken

    special = {token_name(value) for value in read_json_object(folder / "special_tokens_map.json").values() if value}
    added = {
        int(index): AddedToken(content, normalized=False, special=content in special)
        for content, index in read_json_object(folder / "added_tokens.json").items()
    }
    for index, about in config.get("added_tokens_decoder", {}).items():
        added[int(index)] = AddedToken(**{key: about[key] for key in about if key != "id"})
    for index, token in sorted(added.items(), key=lambda item: item[0]):
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ValueError(f"{token.content!r} cannot be token {index:,}")


def token_name(token: object) -> str:
    """Return a special token's name, stored as a string or as an object with the field `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def find_end_of_text(folder: Path) -> str:
    """Return the name of the end-of-text token."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if token := read_json_object(folder / file).get("eos_token"):
            return token_name(token)
    return END_OF_TEXT


def is_gpt2_tokenizer(folder: Path, vocabulary: dict[str, int], content: dict[str, Any]) -> bool:
    """Return True if the files define GPT-2's tokenizer: its vocabulary, no added token, no normalizer.

    `content`: of tokenizer.json, if there is one.
    """
    config = read_json_object(folder / "tokenizer_config.json")
    before = content.get("pre_tokenizer") or {"type": "ByteLevel"}
    own_class = config.get("tokenizer_class") in GPT2_CLASSES
    added = {token["content"] for token in content.get("added_tokens") or []}
    added |= set(read_json_object(folder / "added_tokens.json"))
    added |= {token_name(token) for token in config.get("added_tokens_decoder", {}).values()}
    return (
        vocabulary_digest(vocabulary) == GPT2_DIGEST
        and added <= {END_OF_TEXT}
        and find_end_of_text(folder) == END_OF_TEXT
        and not content.get("normalizer")
        and (before["type"], before.get("use_regex", True)) == ("ByteLevel", True)
        and not (config.get("add_prefix_space", False) if own_class else before.get("add_prefix_space", False))
    )
