"""Read documents from files: plain text, JSON lines, JSON, CSV, Parquet; also compressed. In the file's order."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpt2box.errors import BadInput, Damaged
from gpt2box.utils.paths import COMPRESSION_SUFFIXES, RECORD_SUFFIXES

BLOCK_BYTES = 1 << 24  # bytes of a plain text decoded at a time
BATCH_ROWS = 256  # documents of a Parquet file decoded at a time
GROUP_BYTES = 1 << 23  # text of a Parquet file's row groups that make one unit of work
MAX_FIELD_CHARACTERS = 1 << 30  # characters in a field of a CSV file


@dataclass(frozen=True)
class Unit:
    """Describe a unit of work: a file, or some row groups of a Parquet file."""

    path: Path
    name: str  # as the manifest and messages have it
    column: str
    may_lack: bool = False  # an object without the column has nothing there
    groups: tuple[int, int] | None = None  # first row group, and the one after the last
    rows: int | None = None  # where the file says so


def file_kind(path: Path) -> str:
    """Return the suffix that determines how to read a file, ignoring compression suffixes."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def split_into_units(path: Path, name: str, column: str) -> list[Unit]:
    """Split a file into units of work, in order.

    Raises:
        BadInput: no such column, or a file that cannot be read.
        Damaged: a Parquet file that ends too early or is broken.
    """
    if file_kind(path) != ".parquet":
        return [Unit(path, name, column)]
    with open_parquet(path) as file:
        column = select_text_column(list(file.schema_arrow.names), column, path)
        found: list[Unit] = []
        begin = rows = size = 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            leaves = [about.column(leaf) for leaf in range(about.num_columns)]  # of a nested column there are several
            rows, size = (
                rows + about.num_rows,
                size
                + sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] == column),
            )
            if size >= GROUP_BYTES or group == file.num_row_groups - 1:
                found.append(Unit(path, name, column, False, (begin, group + 1), rows))
                begin, rows, size = group + 1, 0, 0
        return found


def open_parquet(path: Path) -> Any:
    """Open a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise Damaged(
            f"{path} is no whole Parquet file: {first}", "the file as it was written", "get it again"
        ) from error


def select_text_column(names: list[str], wanted: str, path: Path | str) -> str:
    """Return the text column: the requested one, or the only likely one. Raises BadInput: it is not there."""
    if wanted in names:
        return wanted
    likely = [name for name in ("text", "content", "document") if name in names] or (names if len(names) == 1 else [])
    if not wanted and likely:
        return likely[0]
    raise BadInput(
        f"{path}: no column {wanted!r}" if wanted else f"{path}: which column is the text?",
        f"one of: {', '.join(map(str, names[:20]))}",
        "--text-column NAME",
    )


def read_column_names(path: Path) -> list[str]:
    """Return the columns of a file's first record; empty if that is no object or longer than a block.

    Raises BadInput, Damaged: the file cannot be read.
    """
    kind = file_kind(path)
    if kind == ".parquet":
        with open_parquet(path) as file:
            return list(file.schema_arrow.names)
    with open_file(path) as file:
        try:
            begin = file.read(BLOCK_BYTES).decode("utf-8-sig", errors="ignore")
        except UNREADABLE as error:
            raise unreadable_error(path, error) from error
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        try:
            return next(csv.reader(io.StringIO(begin, newline=None), delimiter="\t" if kind == ".tsv" else ","), [])
        except csv.Error:
            return []
    try:
        record, _ = json.JSONDecoder().raw_decode(begin.lstrip(" \r\n\t["))
    except (ValueError, RecursionError):
        return []
    return list(record) if isinstance(record, dict) else []


def read_documents(unit: Unit) -> Iterator[Iterator[str]]:
    """Yield the documents of a unit, each as an iterator of chunks, so that a long one never fills memory.

    Raises:
        BadInput: not UTF-8, binary, not of its format, no such column: where.
        Damaged: a compressed or Parquet file that is broken.
    """
    kind = file_kind(unit.path)
    if kind == ".parquet":
        for text in read_parquet(unit):
            yield iter((text,))
        return
    with open_file(unit.path) as file:
        if kind not in RECORD_SUFFIXES:
            yield decode_text(file, unit.path)
            return
        read = {".jsonl": read_json_lines, ".ndjson": read_json_lines, ".json": read_json_array}.get(kind, read_table)
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if read is read_table else None)
        try:
            for text in read(lines, unit):
                yield iter((text,))
        except UnicodeDecodeError as error:
            with open_file(unit.path) as again:
                for _ in decode_text(again, unit.path):  # which says where
                    pass
            raise BadInput(
                f"{unit.path} is not UTF-8: {error.reason}", "text in UTF-8", iconv_hint(unit.path)
            ) from error
        except UNREADABLE as error:
            raise unreadable_error(unit.path, error) from error


UNREADABLE = (EOFError, zlib.error, lzma.LZMAError, OSError)  # a compressed file that is torn or is none


def unreadable_error(path: Path, error: BaseException) -> Damaged:
    """Return the error for a file that is truncated or of another format."""
    return Damaged(f"{path} cannot be read: {error}", "a whole file", "get it again")


def iconv_hint(path: Path) -> str:
    """Return the command that converts a text to UTF-8."""
    return f"iconv -f WINDOWS-1252 -t UTF-8 {path} > converted.txt, if that is its encoding"


def open_file(path: Path) -> IO[bytes]:
    """Open a file, decompressing it by its suffix."""
    ending = path.suffix.lower()
    if ending == ".zst":
        import pyarrow

        return pyarrow.input_stream(path, compression="zstd")  # type: ignore[no-any-return]
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending, open)
    return opener(path, "rb")  # type: ignore[no-any-return, operator]


def decode_text(file: IO[bytes], path: Path) -> Iterator[str]:
    """Yield a plain text in chunks: UTF-8 with any line ends, as Python's text mode; drops a byte-order mark.

    Raises BadInput: binary, or not UTF-8: at which offset.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset, line, mark = 0, 1, "\ufeff"
    while True:
        try:
            block = file.read(BLOCK_BYTES)
        except UNREADABLE as error:
            raise unreadable_error(path, error) from error
        if not offset and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadInput(
                f"{path} is UTF-16", "plain text in UTF-8", f"iconv -f UTF-16 -t UTF-8 {path} > converted.txt"
            )
        if (zero := block.find(b"\0")) >= 0:
            raise BadInput(f"{path} is binary: a zero byte at offset {offset + zero:,}", "plain text in UTF-8")
        held = len(utf8.getstate()[0])  # bytes of a character that the last block began
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise BadInput(
                f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset"
                f" {offset - held + error.start:,}, line {line:,}",
                "plain text in UTF-8",
                iconv_hint(path),
            ) from error
        if text:
            yield text.removeprefix(mark)
            mark = ""
        if not block:
            return
        offset, line = offset + len(block), line + block.count(b"\n")


def read_parquet(unit: Unit) -> Iterator[str]:
    """Yield the column's texts from a unit's row groups."""
    import pyarrow

    assert unit.groups is not None
    where = f"{unit.path}, row groups {unit.groups[0]} to {unit.groups[1] - 1}"
    with open_parquet(unit.path) as file:
        batches = file.iter_batches(BATCH_ROWS, row_groups=list(range(*unit.groups)), columns=[unit.column])
        while True:
            try:
                batch = next(batches, None)
                values = batch.column(0).to_pylist() if batch is not None else None
            except UnicodeDecodeError as error:
                raise BadInput(f"{where}: not UTF-8 ({error.reason})", "text in UTF-8") from error
            except (pyarrow.ArrowException, OSError) as error:
                first = str(error).splitlines()[0]
                raise Damaged(f"{where}: {first}", "the file as it was written", "get it again") from error
            if values is None:
                return
            for value in values:
                yield check_text(value, where)


def read_json_lines(lines: io.TextIOWrapper, unit: Unit) -> Iterator[str]:
    """Yield the texts of a JSON lines file."""
    column = unit.column
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{unit.path}, line {number}: {error}", "a JSON object a line") from error
        where = f"{unit.path}, line {number}"
        column = column or (select_text_column(list(record), "", unit.path) if isinstance(record, dict) else "")
        yield replace_surrogates(check_text(read_field(record, column, unit, where), where))


def read_json_array(lines: io.TextIOWrapper, unit: Unit) -> Iterator[str]:
    """Yield the texts of a JSON array; also reads JSON lines, which many such files hold."""
    content = lines.read()
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().startswith("["):
            raise BadInput(f"{unit.path}: {error}", "a whole JSON array, or a JSON object a line") from error
        yield from read_json_lines(io.StringIO(content), unit)  # type: ignore[arg-type]
        return
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        where = f"{unit.path}, element {number}"
        column = unit.column or (select_text_column(list(record), "", unit.path) if isinstance(record, dict) else "")
        yield replace_surrogates(check_text(read_field(record, column, unit, where), where))


def read_field(record: object, column: str, unit: Unit, where: str) -> object:
    """Return a record's text column; a record that is no object is the text itself, unless a column was requested.

    Raises BadInput: no such column.
    """
    if isinstance(record, dict):
        return (
            record.get(column)
            if column in record or unit.may_lack
            else record[select_text_column(list(record), column, where)]
        )
    if unit.column:
        raise BadInput(f"{where}: {type(record).__name__}", f"an object with the column {unit.column}")
    return record


def read_table(lines: io.TextIOWrapper, unit: Unit) -> Iterator[str]:
    """Yield the text column of a CSV or TSV file with a header."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    rows = csv.reader(lines, delimiter="\t" if file_kind(unit.path) == ".tsv" else ",", strict=True)
    try:
        names = next((row for row in rows if row), [])
        if not names:
            return
        index = names.index(select_text_column(names, unit.column, unit.path))
        for number, row in enumerate(rows, 2):
            if row:
                if len(row) != len(names):  # an unquoted comma, say: the text's rest would be lost
                    expected = f"{len(names)} fields; a field with a delimiter in double quotes"
                    raise BadInput(f"{unit.path}, row {number}: {len(row)} fields", expected)
                yield row[index]
    except csv.Error as error:  # a quote that is never closed takes in all that follows
        expected = 'fields in double quotes closed, and quotes inside them doubled: "so ""it"" is"'
        raise BadInput(f"{unit.path}, up to line {rows.line_num:,}: {error}", expected) from error


def check_text(value: object, where: str) -> str:
    """Return the text, or an empty string for null. Raises BadInput: of another type."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{where}: the text is {type(value).__name__} {str(value)[:40]!r}", "text", "--text-column NAME")
    return value


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
