"""How byte-level BPE cuts a text into the words that its merges stay within, by the names that GGUF files use.

Enters: `tokenizer.ggml.pre`. Leaves: patterns, applied one after the other, each to what the one before left; what a
pattern matches is a word, and so is what stands between its matches. The names and patterns are llama.cpp's
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp), which come from the models' tokenizer.json
files. To add one, add a row to SPLITS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TextSplit:
    """The patterns (Oniguruma's syntax), and what else a name implies."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """True where a word that is in the vocabulary is one token, even if no merges lead to it."""
    add_bos: bool = False
    """Where the file does not say."""


_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
"""Of English words, in either case: spelled out, for Unicode folds ſ to s."""
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DIGIT = r"\p{N}"
_CJK = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"


def _words(numbers: str, endings: str = f"{_ENDINGS}|", marks: str = "", symbols: str = r"[\r\n]*") -> str:
    """The pattern that GPT-4's cl100k began: words with what precedes them, `numbers`, symbols, spaces."""
    letters = rf"[\p{{L}}{marks}]+" if marks else r"\p{L}+"
    return rf"{endings}[^\r\n\p{{L}}\p{{N}}]?{letters}|{numbers}| ?[^\s\p{{L}}{marks}\p{{N}}]+{symbols}|{_SPACES}"


def _cased(numbers: str, endings: str) -> str:
    """That of GPT-4o's o200k, where a word ends before a capital: a to z and A to Z alone are taken for cased."""
    before, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    return (
        rf"{before}{upper}*{lower}+{endings}|{before}{upper}+{lower}*{endings}|"
        rf"{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

_LLAMA3 = TextSplit((_words(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_QWEN2 = TextSplit((_words(_DIGIT),))
_STARCODER = TextSplit((_DIGIT, _GPT2))
_O200K = TextSplit((_cased(r"\p{N}{1,3}", f"{_ENDINGS}?"),))

_FAMILIES: Mapping[str, TextSplit] = {
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": _LLAMA3,
    "dbrx smaug-bpe glm4 chatglm-bpe": TextSplit(_LLAMA3.patterns),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2": _QWEN2,
    "qwen35": TextSplit((_words(_DIGIT, marks=r"\p{M}"),)),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": TextSplit((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": _STARCODER,
    "tekken": TextSplit((_cased(_DIGIT, ""),), whole_words=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _O200K,
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": TextSplit((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "deepseek-coder": TextSplit(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[[一-龥\x{0800}-一가-\x{d7ff}]&&\S]+", _DIGIT)
    ),
    "falcon": TextSplit((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "default": TextSplit((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "seed-coder": TextSplit((_words(_DIGIT).replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),)),
    "minicpm5": TextSplit((r"\p{N}{1,3}", _words(r"\p{N}+")), whole_words=True),
}

SPLITS: Mapping[str, TextSplit] = {name: split for names, split in _FAMILIES.items() for name in names.split()}
