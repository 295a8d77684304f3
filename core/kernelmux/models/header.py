"""The header of a GGUF file, read in order: numbers and strings, each checked before anything is made of it.

Enters: a StoredFile. Leaves: plain Python values. Every count and length is held against the bytes that are there and
against what real models need, for what a file claims costs memory and time before it turns out to be damage.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn

from kernelmux.models.stored import StoredFile

LONGEST_HEADER = 1 << 26
"""Bytes. The largest vocabularies with their merges take a few tens of MB; what claims more is damage."""
MOST_PAIRS = 1 << 12
"""Metadata pairs; models have some tens."""
MOST_TENSORS = 1 << 17
"""Rows of the tensor table; experts stored one by one make ten thousands."""
MOST_ITEMS = 1 << 20
"""Items of an array; the largest vocabularies have 256 thousand tokens, and twice as many merges."""
LONGEST_KEY = (1 << 16) - 1
"""Bytes of a key, which GGUF sets."""
LONGEST_NAME = 63
"""Bytes of a tensor's name, which ggml sets (GGML_MAX_NAME, which counts an end)."""
LONGEST_TEXT = 1 << 20
"""Bytes of a string by itself; chat templates take up to some 100 KB."""
LONGEST_ITEM = 1 << 12
"""Bytes of a string in an array; tokens take up to a few hundred."""
LARGEST_ARRAY = 1 << 25
"""Bytes of the strings of an array together; a large vocabulary's take some 5 MB."""
PIECE = 1 << 20
"""Bytes that are read at once."""

# The numbers that a metadata value's type may have, with struct's letter for each.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING = 8
ARRAY = 9
Kind = tuple[int, ...]
"""GGUF's type of a metadata value; of an array also that of its items."""
_LENGTH = struct.Struct("<Q")


class Header:
    """A position in the header, which moves on only over bytes that are there."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.data = bytearray()
        self.at = 0
        self.end = min(file.size, LONGEST_HEADER)

    @property
    def left(self) -> int:
        """Bytes that may still follow."""
        return self.end - self.at

    def fail(self, where: str, found: str) -> NoReturn:
        raise self.file.fault(f"{where}: {found}")

    def numbers(self, letters: str, where: str, count: int = 1) -> tuple[Any, ...]:
        """`count` times the numbers of struct's `letters`."""
        size = count * struct.calcsize(f"<{letters}")
        if size > self.left:
            self.overrun(where, size, self.at)
        self.at += size
        self._read_to(self.at)
        return struct.unpack_from(f"<{letters if count == 1 else f'{count}{letters}'}", self.data, self.at - size)

    def text(self, where: str, longest: int) -> str:
        """A string of so many bytes at most: a 64-bit length and then UTF-8."""
        return self._texts(where, 1, longest)[0]

    def value(self, where: str) -> tuple[Any, Kind]:
        """A metadata value, which is a number, bool, string or a list of them, and GGUF's type of it."""
        (kind,) = self.numbers("I", where)
        if kind == STRING:
            return self.text(where, LONGEST_TEXT), (STRING,)
        if kind != ARRAY:
            return self._numbers_of(where, kind, 1)[0], (kind,)
        kind, count = self.numbers("IQ", where)
        if kind == ARRAY:
            self.fail(where, "an array of arrays; arrays of numbers, of bools and of strings are read")
        least = _LENGTH.size if kind == STRING else struct.calcsize(self._letter(where, kind))
        if count * least > self.left:
            self.overrun(where, count * least, self.at)
        if count > MOST_ITEMS:
            self.fail(where, f"an array of {count} items; up to {MOST_ITEMS} are read")
        strings = kind == STRING
        found = self._texts(where, count, LONGEST_ITEM) if strings else self._numbers_of(where, kind, count)
        return found, (ARRAY, kind)

    def _numbers_of(self, where: str, kind: int, count: int) -> list[Any]:
        return list(self.numbers(self._letter(where, kind), where, count))

    def _letter(self, where: str, kind: int) -> str:
        if kind not in NUMBERS:
            known = ", ".join(map(str, sorted([*NUMBERS, STRING, ARRAY])))
            self.fail(where, f"value type {kind} is unknown; known: {known}")
        return NUMBERS[kind]

    def _texts(self, where: str, count: int, longest: int) -> list[str]:
        at, first = self.at, self.at
        data, there = self.data, len(self.data)  # locals: a vocabulary is a hundred thousand turns of this loop
        found = []
        for _ in range(count):
            start = at + _LENGTH.size
            if start > there:
                there = self._read_to(start, where, at)
            (length,) = _LENGTH.unpack_from(data, at)
            at = start + length
            if at > self.end:
                self.overrun(where, length, start)
            if length > longest:
                self.fail(where, f"a string of {length} bytes; up to {longest} are read")
            if at > there:
                there = self._read_to(at)
            try:
                found.append(data[start:at].decode())
            except UnicodeDecodeError as error:
                self.fail(where, f"text at byte {start} is not UTF-8 ({error.reason}); the file is damaged")
            if at - first > LARGEST_ARRAY:
                self.fail(where, f"its strings take more than {LARGEST_ARRAY} bytes, which is the most that is read")
        self.at = at
        return found

    def _read_to(self, end: int, where: str = "", at: int = 0) -> int:
        """Has the bytes up to `end` in `data`, and says how many are there."""
        if end > self.end:
            self.overrun(where, end - at, at)
        if (there := len(self.data)) < end:
            self.data += self.file.read(there, min(max(end - there, PIECE), self.end - there))
        return len(self.data)

    def overrun(self, where: str, size: int, at: int) -> NoReturn:
        limit = "the end of the file" if self.end == self.file.size else "the longest header that is read"
        self.fail(where, f"{size} bytes at byte {at} run past {limit} ({self.end}); it is truncated or damaged")
