"""How published byte-level tokenizers cut a text into words, by the names that llama.cpp gives them."""

from typing import Any, NamedTuple

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen cut a text into words; they differ in how many digits stay together."""


class PreTokenizer(NamedTuple):
    """What llama.cpp means by a pre-tokenizer's name, as the `tokenizers` library spells it."""

    steps: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False  # if the file does not say


def split_words(digits: str) -> dict[str, Any]:
    """Return the steps that cut words by WORDS and then turn them into bytes."""
    split = {"type": "Split", "pattern": {"Regex": WORDS % digits}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"trim_offsets": False, "use_regex": False}]}


# Qwen's normalizer is not in llama.cpp: there a text that is not in NFC has other ids.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(BYTE_LEVEL),
    "smollm": PreTokenizer({"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}),
    "llama-bpe": PreTokenizer(split_words(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(split_words(r"\p{N}"), normalizer={"type": "NFC"}),
}
