"""GGUF files by their parts, and such of which a part is wrong, with what is said of each."""

from __future__ import annotations

import struct

U8, U32, TEXT, ARRAY = 0, 4, 8, 9
HUGE = 2**64 - 1


def text(said):
    raw = said if isinstance(said, bytes) else said.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def row(name, shape=(4,), number=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)


def file(pairs=(), rows=(), data=64, *, magic=b"GGUF", version=3, tensors=None, count=None, order="<"):
    """A file by its parts; 64 bytes of data unless told."""
    counts = (len(rows) if tensors is None else tensors, len(pairs) if count is None else count)
    head = magic + struct.pack(f"{order}IQQ", version, *counts) + b"".join([*pairs, *rows])
    return head + bytes(-len(head) % 32) + bytes(data)


def array(kind, count, items=b""):
    return struct.pack("<IQ", kind, count) + items


BAD = {
    "empty": (b"", "is empty"),
    "wrong magic": (file(magic=b"PK\x03\x04"), r"starts with b'PK.*b'GGUF'"),
    "shorter than its magic": (b"GG", "starts with b'GG'"),
    "cut in the counts": (file()[:20], "counts: 16 bytes at byte 8 run past the end of the file"),
    "version 1": (file(version=1), "version: found 1; versions 2 and 3"),
    "version of the future": (file(version=4), "version: found 4; versions 2 and 3"),
    "big-endian": (file(order=">"), "big-endian"),
    "more tensors than bytes": (file(tensors=HUGE), f"{HUGE} tensors and 0 metadata pairs do not fit"),
    "more pairs than bytes": (file(count=2**40), f"0 tensors and {2**40} metadata pairs do not fit"),
    "pairs that are not there": (file(count=3), "metadata"),
    "endless key": (file([struct.pack("<Q", HUGE) + bytes(20)]), rf"key of metadata pair 0: {HUGE} bytes"),
    "endless text": (file([pair("k", TEXT, struct.pack("<Q", 2**62))]), "metadata 'k': .* run past the end"),
    "text that is not UTF-8": (file([pair("k", TEXT, text(b"\xff\xfe"))]), "metadata 'k': .* not UTF-8"),
    "key that is not UTF-8": (file([pair(b"\xc3", U8, b"1")]), "key of metadata pair 0: .* not UTF-8"),
    "unknown value type": (file([pair("k", 13, bytes(8))]), "metadata 'k': value type 13 is unknown; known: 0, 1"),
    "unknown item type": (file([pair("k", ARRAY, array(99, 1, bytes(8)))]), "'k': value type 99 is unknown"),
    "nested array": (file([pair("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"1")))]), "array of arrays"),
    "endless array": (file([pair("k", ARRAY, array(U32, HUGE))]), "metadata 'k': .* run past the end"),
    "endless array of text": (file([pair("k", ARRAY, array(TEXT, HUGE))]), "metadata 'k': .* run past the end"),
    "array of text cut short": (file([pair("k", ARRAY, array(TEXT, 5, text("a" * 9)))], data=0), "'k': 8 bytes at"),
    "key twice": (file([pair("k", U8, b"1"), pair("k", U8, b"2")]), "metadata 'k': occurs twice"),
    "one of several parts": (file([pair("split.count", U8, b"\x03")]), "is part 1 of 3: name it NAME-00001-of-00003"),
    "parts in words": (
        file([pair("split.count", TEXT, text("3"))]),
        "'split.count': found '3'; a number up to 1000",
    ),
    "a part beyond all": (
        file([pair("split.count", U8, b"\x03"), pair("split.no", U8, b"\x03")]),
        "is part 4 of 3: name it",
    ),
    "alignment of no power": (file([pair("general.alignment", U32, struct.pack("<I", 24))]), "found 24; a power"),
    "alignment of zero": (file([pair("general.alignment", U32, bytes(4))]), "found 0; a power of two"),
    "alignment in words": (file([pair("general.alignment", TEXT, text("32"))]), "found '32'; a power"),
    "tensor twice": (file(rows=[row("w"), row("w", offset=32)]), "tensor 'w': occurs twice"),
    "tensor name not UTF-8": (file(rows=[row(b"\xff")]), "name of tensor 0: .* not UTF-8"),
    "no dimensions": (file(rows=[row("w", ())]), "tensor 'w': 0 dimensions; from 1 to 4"),
    "too many dimensions": (file(rows=[row("w", (1,) * 5)]), "tensor 'w': 5 dimensions; from 1 to 4"),
    "no elements": (file(rows=[row("w", (4, 0))]), r"tensor 'w': shape \(0, 4\) has no elements"),
    "unknown type": (file(rows=[row("w", number=4)]), "tensor 'w': type number 4 .* known: 0 f32, 1 f16, 2 Q4_0"),
    "block that does not divide": (file(rows=[row("w", (48,), 2)]), r"\(48,\): Q4_0 stores rows in blocks of 32"),
    "endless extent": (file(rows=[row("w", (2**62, 2**62))]), "tensor 'w': f32 .* the file has"),
    "extent past the file": (
        file(rows=[row("w", (17,))]),
        r"f32 \(17,\) takes 68 bytes from byte 64 on, the file has 128",
    ),
    "offset past the file": (file(rows=[row("w", offset=2**63)]), f"data at offset {2**63}"),
    "tensors that overlap": (
        file(rows=[row("v"), row("w")]),
        "'w': data at offset 0, the tensors before it end at 32",
    ),
    "no data": (file(rows=[row("w")], data=0), "tensor 'w': .* fetch it again"),
}
