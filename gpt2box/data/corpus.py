"""Open corpora too large for memory: OpenWebText, any dataset of the Hub, the user's files."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt2box.data import hub_datasets
from gpt2box.data.dataset_folder import MIN_DOCUMENTS_TO_HOLD_OUT
from gpt2box.data.readers import file_kind, open_parquet
from gpt2box.data.sources import fingerprint, is_compressed
from gpt2box.data.tokenize_workers import SourceFile
from gpt2box.errors import BadInput
from gpt2box.utils.paths import RECORD_SUFFIXES
from gpt2box.utils.progress import format_bytes, log_line, pluralize

TOKEN_BYTES = {True: 0.76, False: 0.5}  # a byte of compressed text (OpenWebText's 18.1 of 24.2 GB) and of plain


@dataclass(frozen=True)
class FileCorpus:
    """Describe a corpus of files in a fixed order."""

    source: str
    identity: list[dict[str, Any]]  # what the files are; the same gives the same bytes
    sources: list[SourceFile]
    documents: int | None = None  # where known beforehand
    hold_out_tails: bool = False  # a few long texts: the end of each is held out
    is_download: bool = False  # the files are downloaded

    def size_bytes(self) -> int:
        """Return the total size of the files."""
        return sum(source.size_bytes for source in self.sources)

    def token_bytes(self) -> int:
        """Estimate the size of the tokens on disk."""
        return sum(round(s.size_bytes * TOKEN_BYTES[is_compressed(Path(s.name))]) for s in self.sources)


def open_openwebtext(folder: Path | None, files: slice, keep_raw: bool) -> FileCorpus:
    """Open OpenWebText or some of its files from the Hub, a mirror (HF_ENDPOINT) or a local folder.

    Raises BadInput: no such files there.
    """
    pin = hub_datasets.OPENWEBTEXT
    if folder is None:
        sources, known = hub_datasets.list_openwebtext_sources(keep_raw)
        documents = pin.documents if len(sources[files]) == len(sources) else None
        source = f"OpenWebText, {pin.repo}@{pin.revision}"
        return FileCorpus(source, known[files], check_not_empty(sources[files]), documents, is_download=True)
    paths = sorted(folder.glob("train-*.parquet"))
    if not paths:
        raise BadInput(f"no train-*.parquet in {folder}", "the Parquet files of openwebtext, or a part of them")
    paths, of = select_numbered_files(paths, files)
    sources = check_not_empty([hub_datasets.make_local_source(path) for path in paths])
    total = sum(source.size_bytes for source in sources)
    if (len(sources), total) != (pin.files, pin.size_bytes):
        log_line(f"note: {len(sources)} of {of} files, {format_bytes(total)}: not the whole of OpenWebText")
    identity = [fingerprint(path, path.name) for path in paths]
    if any(hub_datasets.KNOWN_FILES.get(i["name"]) not in (None, (i["bytes"], i["sha256"])) for i in identity):
        log_line("note: these are not OpenWebText's files, but others of their names")
    return FileCorpus("OpenWebText, from a folder", identity, sources)


def select_numbered_files(paths: list[Path], files: slice) -> tuple[list[Path], int]:
    """Select files by the number in their names, if all have one: the folder may lack others.

    Returns the selected files and the number of files in the complete corpus.

    Raises BadInput: a selected file is missing.
    """
    found = [re.fullmatch(r"train-(\d{5})-of-(\d{5})\.parquet", path.name) for path in paths]
    if files.stop is None or not all(found) or len({match[2] for match in found if match}) != 1:
        return paths[files], len(paths)
    of = int(found[0][2]) if found[0] else 0
    by_number = {int(match[1]): path for match, path in zip(found, paths, strict=True) if match}
    wanted = range(of)[files]
    if missing := [number for number in wanted if number not in by_number]:
        raise BadInput(
            f"no train-{missing[0]:05d}-of-{of:05d}.parquet in {paths[0].parent}",
            f"the files {wanted.start} to {wanted.stop - 1}",
        )
    return [by_number[number] for number in wanted], of


def open_hub_dataset(name: str, config: str, split: str, files: slice, keep_raw: bool) -> FileCorpus:
    """Open a dataset of the Hub. Raises BadInput: no such dataset, or no such files of it."""
    sources, title = hub_datasets.list_hub_dataset(name, config, split, files, keep_raw)
    identity = [{"name": s.name, "bytes": s.size_bytes, "sha256": s.sha256} for s in check_not_empty(sources)]
    return FileCorpus(title, identity, sources, is_download=True)


def check_not_empty(sources: list[SourceFile]) -> list[SourceFile]:
    """Return the sources if there are any. Raises BadInput: there are none."""
    if not sources:
        raise BadInput("there are not so many files", "two numbers, such as 0:8, of files counted from 0")
    return sources


def open_own_files(files: list[tuple[Path, str]]) -> FileCorpus:
    """Open the user's files; reads them once for their checksums."""
    plain = all(file_kind(path) not in RECORD_SUFFIXES for path, _ in files)
    if (total := sum(path.stat().st_size for path, _ in files)) > 1 << 32:
        log_line(f"reading {pluralize(len(files), 'file')}, {format_bytes(total)}, to know them again")
    identity = [fingerprint(path, name) for path, name in files]
    sources = [replace(hub_datasets.make_local_source(path), name=name) for path, name in files]
    source = ", ".join(str(path) for path, _ in files[:20]) + (", …" if len(files) > 20 else "")
    return FileCorpus(source, identity, sources, None, plain and len(files) < MIN_DOCUMENTS_TO_HOLD_OUT)


def check_row_counts(sources: list[SourceFile]) -> None:
    """Check that the files state their row counts, as nanoGPT's order needs. Raises BadInput: one does not."""
    if others := [source.name for source in sources if file_kind(Path(source.name)) != ".parquet"]:
        expected = "Parquet files, which say how many documents they hold"
        raise BadInput(f"--split nanogpt with {others[0]}", expected)


def count_rows(sources: list[SourceFile]) -> int:
    """Count the rows of Parquet files from their metadata."""
    total = 0
    for source in sources:
        with open_parquet(source.fetch()) as file:
            total += file.metadata.num_rows
        source.unlock()
    return total
