"""Strings that try a tokenizer: many scripts, code, spaces of every kind, control characters, random bytes."""

from __future__ import annotations

import random

SCRIPTS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "accents": "éèêëàâäçñöüßøåæœÉÈÀÇÑÖÜØÅÆŒſıİšžŁłđ",
    "greek": "αβγδεζηθικλμνξοπρστυφχψωΑΒΓΔΩάέήίόύώ",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяАБВГДЁё",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת",
    "devanagari": "अआइईउऊकखगघचछजझटठडढतथदधनपफबभमयरलवशषसह\u093e\u093f\u0940\u0941\u0902\u094d",
    "thai": "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวศษสหอ\u0e31\u0e34\u0e35\u0e38\u0e48\u0e49",
    "hangul": "가나다라마바사아자차카타파하한국어글",
    "kana": "あいうえおかきくけこさしすせそアイウエオカキクケコー",
    "han": "的一是不了人我在有他这中大来上国個漢字𠀀𪚥",
    "emoji": "🙂😀👍🏽❤\ufe0f👨\u200d👩\u200d👧🇫🇷🏳\ufe0f\u200d🌈",
    "digits": "0123456789٠١٢٣४५六½²Ⅷ①",
    "marks": "\u0301\u0308\u0327\u20dd",
    "symbols": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~€£¥©®°±×÷«»“”‘’…–—、。・",
    "spaces": " \t\n\r\v\f\u0085\u00a0\u2003\u2028\u202f\u3000",
    "controls": "\0\1\2\x07\x08\x1b\x7f\x80\x9f\u200b\u200d\u2060\ufeff\ufffd\ue000\U0010fffd",
}
PHRASES = (
    "Hello, world!", "The quick brown fox", "don't we'll I'M they'VE it's HE'LL 'tis", "12345678 3.14159 1,000,000",
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n}\n", "<html>\r\n  <p>é</p>\r\n",
    "\n\n\n", "   ", "a  b   c", "camelCaseName snake_case_name SCREAMING_CASE", "https://example.org/a?b=c&d=%20#e",
    "SELECT * FROM t WHERE a='b';", "½²Ⅷ①", "\\frac{1}{2}", "--------", "==== ====", "日本語のテスト。",
    "中文测试，你好！",
    "Привет, мир!", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "안녕하세요 세계", "Γειά σου Κόσμε",
    "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈", "e\u0301 n\u0303", "\u2581a\u2581", " a", "a ", "<0x41>", "ǅ", "ﬁ", "㎏",
    "x" * 40,
)  # fmt: skip

PLANES = (
    (0, 0x80),
    (0, 0x800),
    (0, 0xD800),
    (0xE000, 0x10000),
    (0x1F300, 0x1F650),
    (0x20000, 0x2A6D0),
    (0xF0000, 0x110000),
)
"""Latin, the scripts, the first plane, emoji, rare Han, private use: few of these are younger than Unicode 15."""


def texts(count: int, seed: int = 0) -> list[str]:
    """`count` strings of up to some hundred characters, the same ones for the same seed."""
    chance = random.Random(seed)
    return [_text(chance) for _ in range(count)]


def _text(chance: random.Random) -> str:
    kind = chance.randrange(4)
    if kind == 0:
        return "".join(_run(chance) for _ in range(chance.randrange(1, 12)))
    if kind == 1:
        return chance.choice(["", " ", "\n"]).join(chance.choice(PHRASES) for _ in range(chance.randrange(1, 6)))
    if kind == 2:
        return chance.randbytes(chance.randrange(60)).decode(chance.choice(["utf-8", "latin-1"]), errors="replace")
    return "".join(chr(_code_point(chance)) for _ in range(chance.randrange(1, 30)))


def _run(chance: random.Random) -> str:
    """Some characters of one script, often with a space before them."""
    letters = SCRIPTS[chance.choice(list(SCRIPTS))]
    return chance.choice(["", "", " "]) + "".join(chance.choice(letters) for _ in range(chance.randrange(1, 8)))


def _code_point(chance: random.Random) -> int:
    low, high = chance.choice(PLANES)
    return chance.randrange(low, high)
