"""JSON files as records: an array or one object a line, told by the content, also compressed.

    file ── _open_content ──> descriptor of its JSON text ── one pass ──> JsonFile: places of the records
    JsonFile[i]   reads and parses one record

Every record is parsed once when the file is opened, so that broken JSON is found before any work is done. In memory are
the places of the records and their ids, about 50 bytes each, and never the text. What is not a plain UTF-8 file on this
machine is unpacked into an unnamed temporary file (below TMPDIR).
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import re
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol, cast

import zstandard

from common.data.record_keys import count_unused_keys, find_source_id
from common.data.sample_ids import SourceIds
from common.errors import DataError
from common.storage.files import Location, open_ranged

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_CHUNK_BYTES = 1 << 20
# Small, because zstd may expand it by a factor of 30,000.
_COMPRESSED_CHUNK_BYTES = 1 << 14

_SPACE = re.compile(r"[ \t\n\r]*")
# The longest token that a cut may have shortened is an escape, \ud83d\ude00.
_LONGEST_TOKEN = 12


class _HasRead(Protocol):
    def read(self, size: int, /) -> bytes: ...


class JsonFile:
    """Records of one JSON file, read from the disk one at a time; it may be pickled while this process lives.

    `sha256` (hex) is that of the unpacked text, `unused` counts the keys that are not used.
    """

    def __init__(self, path: Location) -> None:
        """Indexes the file.

        Raises:
            DataError: the file is unreadable, or a record is broken or no object; names the line.
            StorageError: the store failed.
        """
        self.path = path
        self.source_ids = SourceIds()
        self.unused: Counter[str] = Counter()
        self._starts, self._ends, self._blank_before = array("q"), array("q"), array("q")
        try:
            self._file = _open_content(path)
            self._state = self._stat()
            self._index()
        except (OSError, EOFError, UnicodeError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(
                f"{path}: the dataset cannot be read ({error}); check, copy or compress it again"
            ) from error
        self._check_unchanged()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._starts[index], self._ends[index]
        self._check_unchanged()
        return self._parse(os.pread(self._file.fileno(), end - start, start), start, index)

    def __getstate__(self) -> dict[str, Any]:
        # The file may have no name, so that another process opens it by this one's descriptor.
        return {**self.__dict__, "_file": f"/proc/{os.getpid()}/fd/{self._file.fileno()}"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = Path(state["_file"]).open("rb")  # noqa: SIM115 - open as long as this object

    def position(self, index: int) -> str:
        """Returns where a record stands, for messages."""
        if self._is_array:
            return f"element {index}"
        return f"line {index + 1 + bisect_right(self._blank_before, index)}"

    def _check_unchanged(self) -> None:
        if self._stat() != self._state:
            raise DataError(f"{self.path}: was changed while it was read; start again once it stays as it is")

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _index(self) -> None:
        start, first = _find_first_character(self._file)
        # Where a file begins with neither, its name decides how the error is found.
        self._is_array = first != b"{" if first in (b"[", b"{") else ".jsonl" not in self.path.suffixes
        if first:
            records = self._scan_array(start) if self._is_array else self._scan_lines()
            for begin, end, record in records:
                self._starts.append(begin)
                self._ends.append(end)
                self._add(record, begin, len(self._starts) - 1)
        sha256 = hashlib.sha256()
        for chunk in self._chunks_before(self._state[0]):
            sha256.update(chunk)
        self.sha256 = sha256.hexdigest()

    def _add(self, record: Any, start: int, index: int) -> None:
        count_unused_keys(self._check_object(record, start, index), self.unused)
        self.source_ids.append(find_source_id(record, f"{self.path}: {self.position(index)}"))

    def _check_object(self, record: Any, start: int, index: int) -> dict[str, Any]:
        if not isinstance(record, dict):
            raise DataError(
                f"{self.path}: {self.position(index)}: found {type(record).__name__}, expected a JSON object"
                + ("" if self._is_array else f" (line {self._line_of(start)})")
            )
        return record

    def _scan_lines(self) -> Iterator[tuple[int, int, Any]]:
        """Yields (start, end, record) of each line that is not blank; start and end are places in the file."""
        self._file.seek(0)
        start = 0
        for line in self._file:
            if not start:
                # A byte order mark belongs to no record.
                skipped = len(line) - len(line.removeprefix(codecs.BOM_UTF8))
                start, line = skipped, line[skipped:]
            if line.strip():
                text = line.rstrip(b"\r\n")
                yield start, start + len(text), self._parse(text, start, len(self._starts))
            else:
                self._blank_before.append(len(self._starts))
            start += len(line)

    def _parse(self, text: bytes, start: int, index: int) -> dict[str, Any]:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not self._is_array and index == 0 and self._begins_with_object_over_lines(start):
                raise DataError(
                    f"{self.path}: line {self._line_of(start)}: an object over several lines; expected a JSON array of "
                    "samples, or one sample a line"
                ) from None
            self._raise_at(start, text, error)
        return self._check_object(record, start, index)

    def _begins_with_object_over_lines(self, start: int) -> bool:
        scanner = _ArrayScanner(self._file, start)
        try:
            scanner.read_value()
        except (ValueError, RecursionError):
            return False
        # A string of JSON holds no line break itself, so this one stands between keys or values.
        return self._line_of(scanner.place) > self._line_of(start)

    def _scan_array(self, start: int) -> Iterator[tuple[int, int, Any]]:
        """Yields (start, end, record) of each element."""
        scanner = _ArrayScanner(self._file, start)
        try:
            if not scanner.takes("["):
                found = type(scanner.read_value()[1]).__name__
                raise DataError(
                    f"{self.path}: found a JSON {found}, expected an array of samples, or one sample a line"
                )
            if scanner.takes("]"):
                scanner.check_end()
                return
            while True:
                begin, record = scanner.read_value()
                end = scanner.place
                if not scanner.is_ascii:
                    text = os.pread(self._file.fileno(), end - begin, begin)
                    record = self._parse(text, begin, len(self._starts))
                yield begin, end, record
                if scanner.takes("]"):
                    scanner.check_end()
                    return
                scanner.check_comma()
        except json.JSONDecodeError as error:
            self._raise_at(error.pos, b"", error)
        except RecursionError as error:
            self._raise_at(scanner.place, b"", error)

    def _raise_at(self, start: int, text: bytes, error: Exception) -> NoReturn:
        """Raises DataError for what is wrong with `text`, which begins at `start`."""
        if isinstance(error, UnicodeDecodeError):
            place, reason = start + error.start, f"not UTF-8: {error.reason}"
            raise DataError(f"{self.path}: line {self._line_of(place)}: {reason}") from error
        if isinstance(error, json.JSONDecodeError):
            place = start + len(text.decode(errors="replace")[: error.pos].encode())
            before = os.pread(self._file.fileno(), place - (start := self._line_start(place)), start)
            column = len(before.decode(errors="replace")) + 1
            raise DataError(
                f"{self.path}: line {self._line_of(place)}, column {column}: broken JSON: {error.msg}"
            ) from error
        raise DataError(f"{self.path}: line {self._line_of(start)}: cannot be read as JSON: {error}") from error

    def _line_of(self, place: int) -> int:
        """Returns the number of the line, from 1, of a place in the file."""
        return 1 + sum(chunk.count(b"\n") for chunk in self._chunks_before(place))

    def _line_start(self, place: int) -> int:
        """Returns the place at which the line of `place` begins; a byte order mark is part of no line."""
        start, at = 0, 0
        for chunk in self._chunks_before(place):
            if at == 0 and chunk.startswith(codecs.BOM_UTF8):
                start = len(codecs.BOM_UTF8)
            if (found := chunk.rfind(b"\n")) >= 0:
                start = at + found + 1
            at += len(chunk)
        return start

    def _chunks_before(self, place: int) -> Iterator[bytes]:
        at = 0
        while at < place and (chunk := os.pread(self._file.fileno(), min(_CHUNK_BYTES, place - at), at)):
            yield chunk
            at += len(chunk)


class _ArrayScanner:
    """Reads JSON values from a file one after the other, with bounded memory.

    The text is decoded as Latin-1, in which a character is a byte and every character of JSON's grammar is itself. A
    value whose `is_ascii` is False has to be parsed again from its bytes.
    """

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text, self._position = "", 0
        self._text_start = start  # place of the text's first character in the file
        self._read_from = start
        self.is_ascii = True

    @property
    def place(self) -> int:
        """Place in the file of the next character."""
        return self._text_start + self._position

    def takes(self, character: str) -> bool:
        """Skips white space, and returns True if `character` follows, which is then passed."""
        if self._peek() != character:
            return False
        self._position += 1
        return True

    def check_comma(self) -> None:
        """Raises JSONDecodeError if no comma follows."""
        if not self.takes(","):
            self._fail("Expecting ',' delimiter", self.place)

    def check_end(self) -> None:
        """Raises JSONDecodeError if more than white space follows."""
        if self._peek():
            self._fail("Extra data", self.place)

    def read_value(self) -> tuple[int, Any]:
        """Returns the place at which the next value begins, and the value.

        Raises:
            JSONDecodeError: with its place in the file. RecursionError: it is too deeply nested.
        """
        self._peek()
        begin = self.place
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                message, position = error.msg, error.pos
            else:
                # A number may go on behind the end of the text.
                if end < len(self._text) or not self._read_more():
                    self.is_ascii = self._text[self._position : end].isascii()
                    self._position = end
                    return begin, value
                continue
            place = self._text_start + position
            may_be_cut = message.startswith("Unterminated string") or position >= len(self._text) - _LONGEST_TOKEN
            if not (may_be_cut and self._read_more()):
                self._fail(message, place)

    def _peek(self) -> str:
        """Skips white space, and returns the next character; an empty text at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match is not None
            self._position = match.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        """Reads as much again as is held; returns False at the end of the file."""
        kept = self._text[self._position :]
        chunk = os.pread(self._file.fileno(), max(_CHUNK_BYTES, len(kept)), self._read_from)
        self._read_from += len(chunk)
        self._text_start += self._position
        self._text, self._position = kept + chunk.decode("latin-1"), 0
        return bool(chunk)

    def _fail(self, message: str, place: int) -> NoReturn:
        error = json.JSONDecodeError(message, "", 0)
        error.pos = place
        raise error


def _find_first_character(file: BinaryIO) -> tuple[int, bytes]:
    """Returns the place and the value of the first character that is no white space; an empty one if there is none."""
    file.seek(0)
    at = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    file.seek(at)
    while chunk := file.read(_CHUNK_BYTES):
        if rest := chunk.lstrip():
            return at + len(chunk) - len(rest), rest[:1]
        at += len(chunk)
    return at, b""


def _open_content(path: Location) -> BinaryIO:
    """Opens the JSON text of a file, which may be compressed with gzip or zstd, told by its name or its first bytes.

    All members of a gzip file and all frames of a zstd file are read.
    """
    raw = open_ranged(path)
    try:
        magic = raw.read(len(_ZSTD_MAGIC))
        raw.seek(0)
        if path.suffix == ".gz" or magic.startswith(_GZIP_MAGIC):
            return _unpack(_read_chunks(cast(_HasRead, gzip.GzipFile(fileobj=raw)), _CHUNK_BYTES))
        if path.suffix == ".zst" or magic.startswith(_ZSTD_MAGIC):
            return _unpack(_read_zstd(raw))
        if magic.startswith(_UTF16_MARKS):
            return _unpack(_read_utf16(raw))
        if isinstance(path, Path):
            return raw
        return _unpack(_read_chunks(raw, _CHUNK_BYTES))
    except BaseException:
        raw.close()
        raise


def _unpack(chunks: Iterator[bytes]) -> BinaryIO:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        stack.pop_all()
        return cast(BinaryIO, file)


def _read_chunks(file: _HasRead, size: int) -> Iterator[bytes]:
    while chunk := file.read(size):
        yield chunk


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    # A stream reader would stop without an error after the first frame, or where the file is cut off.
    frame = None
    for chunk in _read_chunks(file, _COMPRESSED_CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise zstandard.ZstdError("the compressed data ends too early")


def _read_utf16(file: BinaryIO) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16")()
    for chunk in _read_chunks(file, _CHUNK_BYTES):
        yield decoder.decode(chunk).encode()
    yield decoder.decode(b"", final=True).encode()
