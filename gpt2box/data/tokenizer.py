"""Encode text to token ids and back: GPT-2's byte-level BPE (tiktoken), characters, and others (hf_tokenizer.py).

A tokenizer is kept as a folder of Hugging Face files, so that `AutoTokenizer` reads the very
folder that `load` reads. GPT-2's files are derived from the pinned ranks; no network is used.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gpt2box.data import downloads
from gpt2box.errors import BadInput, Damaged, describe_error
from gpt2box.model.shape import GPT2_PADDED_VOCAB_SIZE, GPT2_VOCAB_SIZE
from gpt2box.utils.files import read_json
from gpt2box.utils.paths import raw_dir

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZES = (GPT2_VOCAB_SIZE, GPT2_PADDED_VOCAB_SIZE)  # of GPT-2's embedding, also as nanoGPT fills it up
Tokens = npt.NDArray[np.uint16]


class Tokenizer(Protocol):
    """Define the interface of a tokenizer."""

    kind: str
    vocab_size: int
    end_of_text: int | None  # its id, where the vocabulary has one

    def encode(self, text: str) -> Tokens:
        """Encode the text; a special token's name in it is ordinary text."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode tokens to UTF-8; a single token may be part of a character."""

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token by its name in Hugging Face's files."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into an existing folder."""


class Gpt2Tokenizer:
    """GPT-2's byte-level BPE: 50,256 ranks and the end-of-text token."""

    kind = "gpt2"

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        self.ranks = ranks
        self.end_of_text: int | None = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )

    def encode(self, text: str) -> Tokens:
        try:
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Rust's; its regex engine has a limit
                raise
            found = "tiktoken gave up on the text: a run of hundreds of thousands of spaces, or the like"
            raise BadInput(found, "text as people write it") from error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """Derive the merges once: it takes most of a second, and every checkpoint writes them."""
        return derive_merges(self.ranks)

    def vocabulary(self) -> dict[str, int]:
        return {printable(token): rank for token, rank in self.ranks.items()} | {END_OF_TEXT: len(self.ranks)}

    def save(self, folder: Path) -> None:
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary()), encoding="utf-8")
        merges = "".join(f"{printable(a)} {printable(b)}\n" for a, b in self.merges)
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        _write_tokenizer_config(folder, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **special})


class CharTokenizer:
    """Map each character to an id in code-point order, as nanoGPT's shakespeare_char; end-of-text may follow."""

    kind = "char"

    def __init__(self, characters: str, end_of_text: bool) -> None:
        self.characters = characters
        self.end_of_text = len(characters) if end_of_text else None
        self.vocab_size = len(characters) + end_of_text
        self._ids = {character: index for index, character in enumerate(characters)}

    def encode(self, text: str) -> Tokens:
        try:
            return np.fromiter((self._ids[c] for c in text), dtype=np.uint16, count=len(text))
        except KeyError:
            missing = sorted(set(text) - self._ids.keys())
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in missing[:10]) + (", …" if len(missing) > 10 else "")
            raise BadInput(
                f"not in this model's {len(self.characters)} characters: {shown}",
                f"a text of these: {self.characters!r}",
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        text = "".join(END_OF_TEXT if i == self.end_of_text else self.characters[i] for i in ids)
        return text.encode(errors="replace")

    def vocabulary(self) -> dict[str, int]:
        return self._ids | ({} if self.end_of_text is None else {END_OF_TEXT: self.end_of_text})

    def save(self, folder: Path) -> None:
        added = []
        if self.end_of_text is not None:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added = [{"id": self.end_of_text, "content": END_OF_TEXT, "special": True, **flags}]
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": split,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": ""},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        special = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT) if added else {}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write_tokenizer_config(folder, {**config, **special})


def _write_tokenizer_config(folder: Path, content: dict[str, object]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_gpt2_tokenizer(path: Path) -> Gpt2Tokenizer:
    """Load the GPT-2 tokenizer from a verified tiktoken ranks file: lines of base64 and rank."""
    lines = path.read_bytes().splitlines()
    return Gpt2Tokenizer(
        {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    )


def build_char_tokenizer(texts: Iterable[str], end_of_text: bool) -> CharTokenizer:
    """Build a character tokenizer from these texts."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if len(characters) >= 65_535:
        raise BadInput(f"{len(characters):,} different characters", "at most 65,534", "use --tokenizer gpt2")
    return CharTokenizer("".join(sorted(characters)), end_of_text)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer in `folder`; tokenizer.json is preferred to vocab.json, as in transformers.

    Raises:
        BadInput: there is none, or one of another kind.
        Damaged: its files are not what this program or Hugging Face writes.
    """
    from gpt2box.data.hf_tokenizer import BpeTokenizer, is_gpt2_tokenizer  # which needs this module

    try:
        content = {}
        if (folder / "tokenizer.json").exists():
            content = read_json(folder / "tokenizer.json")
            model = content["model"]
            if model["type"] == "WordLevel" and all(len(character) == 1 for character in model["vocab"]):
                check_ids(model["vocab"])
                ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
                return CharTokenizer("".join(ordered), bool(content["added_tokens"]))
            if model["type"] != "BPE":
                raise BadInput(f"{folder}/tokenizer.json: a {model['type']} tokenizer", "vocab.json and merges.txt")
            vocabulary = model["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        elif (folder / "vocab.json").exists():
            vocabulary = read_json(folder / "vocab.json")
        else:
            raise BadInput(f"{folder}: no tokenizer", "vocab.json and merges.txt, or tokenizer.json")
        check_ids(vocabulary)
        return _from_vocabulary(vocabulary) if is_gpt2_tokenizer(folder, vocabulary, content) else BpeTokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(
            f"{folder}: the tokenizer's files are damaged ({describe_error(error)})", "files as they were written"
        ) from error


def load_model_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of the model in `folder`; GPT-2's if it has none and `vocab_size` is GPT-2's.

    Raises BadInput: no tokenizer, and other rows than GPT-2's; or see load.
    """
    if any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        return load_tokenizer(folder)
    if vocab_size not in GPT2_VOCAB_SIZES:
        found = f"{folder}: no tokenizer, and {vocab_size:,} tokens are not GPT-2's {GPT2_VOCAB_SIZES[0]:,}"
        raise BadInput(found, "its tokenizer beside it: tokenizer.json, or vocab.json and merges.txt")
    return load_gpt2_tokenizer(downloads.fetch(downloads.GPT2_RANKS, raw_dir()))


def tokenizer_identity(asked: str) -> str:
    """Return a tokenizer's identity: gpt2, char, or the checksum of a folder's vocabulary."""
    return asked if asked in ("gpt2", "char") else vocabulary_digest(load_tokenizer(Path(asked)).vocabulary())


def vocabulary_digest(vocabulary: dict[str, int]) -> str:
    """Return a short checksum of a vocabulary: equal if each token has the same id."""
    ordered = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()[:16]


def _from_vocabulary(vocabulary: dict[str, int]) -> Gpt2Tokenizer:
    """Build GPT-2's BPE from printable tokens and ids, which are the ranks."""
    alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}
    ranks = {token: rank for token, rank in vocabulary.items() if token != END_OF_TEXT}
    return Gpt2Tokenizer({bytes(alphabet[c] for c in token): rank for token, rank in ranks.items()})


def check_ids(vocabulary: dict[str, int]) -> None:
    """Check that each id from 0 on occurs once. Raises ValueError: if not."""
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"the ids of {len(vocabulary):,} tokens are not those from 0 to {len(vocabulary) - 1:,}")


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt; an empty one becomes the end-of-text token, or a line feed.

    Raises BadInput: a character that the vocabulary lacks.
    """
    if prompt:
        return [int(i) for i in tokenizer.encode(prompt)]
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return [int(tokenizer.encode("\n")[0])]
    except BadInput:
        return [0]


@cache
def byte_alphabet() -> tuple[str, ...]:
    """Return the printable character that stands for each byte in GPT-2's vocabulary files.

    Printable Latin-1 stands for itself, the rest for U+0100 onwards in order (Radford et al. 2019,
    the released encoder.py).
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return tuple(chr(byte) if byte in itself else chr(next(shifted)) for byte in range(256))


def printable(token: bytes) -> str:
    return "".join(byte_alphabet()[byte] for byte in token)


def derive_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Derive the pair that each multi-byte token was merged from, in order of rank.

    Merging a token's bytes by all lower ranks leaves exactly its two parts.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs
