"""Dataset files of JSON as records: an array or one object a line, told by the content, also compressed.

bytes of a file ── decompress ──> text ── index_records ──> parsed elements of an array, or places of lines
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import zstandard

from common.errors import DataError
from common.storage.files import Location

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BEFORE_FIRST_RECORD = re.compile(rb"(?:%b)?\s*" % _BYTE_ORDER_MARK)


class Line(NamedTuple):
    """Place of a record in a file of one JSON object a line: a range of bytes, and the line's number from 1."""

    start: int
    end: int
    number: int


def decompress(path: Location, data: bytes) -> bytes:
    """Returns the content of a file that may be compressed with gzip or zstd, told by its name or its first bytes.

    All members of a gzip file and all frames of a zstd file are read.

    Raises:
        DataError: the compressed data is damaged or ends too early.
    """
    try:
        if path.suffix == ".gz" or data.startswith(_GZIP_MAGIC):
            return gzip.decompress(data)
        if path.suffix == ".zst" or data.startswith(_ZSTD_MAGIC):
            return _decompress_zstd(data)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: the dataset cannot be read ({error}); copy or compress it again") from error
    return data


def index_records(path: Location, data: bytes) -> list[Any]:
    """Returns the parsed elements of a JSON array, or a `Line` for each line that is not blank.

    The first character tells the two apart, whatever the file is called: an array begins with a bracket, an object on
    a line of its own with a brace. Where a file begins with neither, its name decides how the error is found.

    Raises:
        DataError: an array or the first line is broken JSON, or an object stands over several lines.
    """
    start = _BEFORE_FIRST_RECORD.match(data)
    first = b"" if start is None else data[start.end() : start.end() + 1]
    if not first:
        return []
    has_lines = first == b"{" if first in b"[{" else ".jsonl" in path.suffixes
    if not has_lines:
        return _parse_array(path, data)
    lines = list(_index_lines(data))
    _check_first_line(path, data, lines)
    return lines


def parse_line(path: Location, data: bytes, line: Line) -> Any:
    """Parses the record of a line. Raises DataError if it is broken."""
    return _parse(data[line.start : line.end], path, line.number)


def _decompress_zstd(data: bytes) -> bytes:
    # A stream reader would stop without an error after the first frame, or where the file is cut off.
    contents = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        contents.append(frame.decompress(data))
        if not frame.eof:
            raise zstandard.ZstdError("the compressed data ends too early")
        data = frame.unused_data
    return b"".join(contents)


def _index_lines(data: bytes) -> Iterator[Line]:
    start, number = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0, 1
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            yield Line(start, end, number)
        start, number = end + 1, number + 1


def _check_first_line(path: Location, data: bytes, lines: list[Line]) -> None:
    """Raises DataError if the first line is broken, or is only the beginning of an object over several lines."""
    if not lines:
        return
    try:
        parse_line(path, data, lines[0])
    except DataError:
        if _begins_with_object_over_lines(data):
            raise DataError(
                f"{path}: line {lines[0].number}: an object over several lines; expected a JSON array of samples, or "
                "one sample a line"
            ) from None
        raise


def _begins_with_object_over_lines(data: bytes) -> bool:
    try:
        text = data.decode("utf-8-sig").lstrip()
        end = json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return False
    # A string of JSON holds no line break itself, so this one stands between keys or values.
    return "\n" in text[:end]


def _parse_array(path: Location, data: bytes) -> list[Any]:
    records = _parse(data, path, 1)
    if not isinstance(records, list):
        raise DataError(
            f"{path}: found a JSON {type(records).__name__}, expected an array of samples, or one sample a line"
        )
    return records


def _parse(data: bytes, path: Location, first_line: int) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}: line {line}, column {error.colno}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}: line {line}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {first_line}: cannot be read as JSON: {error}") from error
