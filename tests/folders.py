"""Folders with a tokenizer.json, as transformers' save_pretrained writes them, of vocabularies trained in the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from texts import texts

CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
SPACE = "\u2581"
WORDS = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _llama3() -> Tokenizer:
    """Words by a pattern, bytes, and `<s>` before each text."""
    made = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts(300, seed=3), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(list(CONTROLS))
    made.add_tokens([AddedToken("<think>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def _pieces(normalizer: Any, pre_tokenizer: Any, strips: bool) -> Tokenizer:
    """SentencePiece's BPE as transformers converts it: bytes fall back, `<s>` is a token of the model's own."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    lines = [text.replace(" ", SPACE) for text in texts(300, seed=3)]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", *CONTROLS, *bytes_], show_progress=False)
    made.train_from_iterator(lines, trainer)
    # Of what was trained only the model is kept: bytes are no added tokens.
    model = json.loads(made.to_str())["model"] | {"byte_fallback": True}
    made = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    made.add_special_tokens(["<unk>", *CONTROLS])
    made.add_tokens([AddedToken("<think>", normalized=False)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=800, special_tokens=["<unk>", *CONTROLS], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([text for text in texts(900, seed=3) if text.isascii()], trainer)
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "byte level": _llama3,
    "llama 2": lambda: _pieces(
        normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]), None, strips=True
    ),
    "mistral": lambda: _pieces(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), strips=True),
    "gemma": lambda: _pieces(normalizers.Replace(" ", SPACE), None, strips=False),
    "unigram": _unigram,
}


def write_tokenizer(path: Path, kind: str, **config: Any) -> Path:
    """Writes the files of a tokenizer into a folder; `config` adds to tokenizer_config.json, None leaves out."""
    path.mkdir(parents=True, exist_ok=True)
    KINDS[kind]().save(str(path / "tokenizer.json"))
    stated = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **config,
    }
    kept = {key: value for key, value in stated.items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(kept), "utf-8")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}), "utf-8")
    return path
