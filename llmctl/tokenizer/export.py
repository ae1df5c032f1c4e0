"""Write `tokenizer.json` and `tokenizer_config.json` for our own tokenizers, without Hugging Face's libraries.

The vocabulary contains plain spaces instead of U+2581, which therefore falls back to bytes as it does in ours. Ids
agree for all texts except those that spell out a special token, which Hugging Face parses. (With a unigram model, ties
between equally likely segmentations may be broken differently.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.tokenizer.base import Frame

SPACE = "\u2581"


def tokenizer_json(
    scored: Sequence[tuple[str, float]], specials: Mapping[str, int], is_unigram: bool
) -> dict[str, Any]:
    """Return the content of `tokenizer.json` for pieces in id order."""
    pieces = [piece if piece in specials else piece.replace(SPACE, " ") for piece, _ in scored]
    unk = next(piece for piece in specials if "unk" in piece)
    if is_unigram:
        model: dict[str, Any] = {
            "type": "Unigram",
            "unk_id": specials[unk],
            "vocab": [[piece, score] for piece, (_, score) in zip(pieces, scored, strict=True)],
            "byte_fallback": True,
        }
    else:
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges(pieces, [score for _, score in scored], specials),
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(piece) | {"id": index} for piece, index in sorted(specials.items(), key=lambda x: x[1])
        ],
        "normalizer": None,
        "pre_tokenizer": digit_split(pieces, specials) if is_unigram else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def post_processor(frame: Frame, names: Mapping[int, str]) -> dict[str, Any] | None:
    """Return the step that puts the special tokens around a text or a pair; None if there are none."""

    def special(ids: Sequence[int], type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": names[index], "type_id": type_id}} for index in ids]

    def text(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    used = dict.fromkeys(frame.before + frame.between + frame.after)
    if not used:
        return None
    first = [*special(frame.before, 0), text("A", 0)]
    return {
        "type": "TemplateProcessing",
        "single": [*first, *special(frame.after, 0)],
        "pair": [*first, *special(frame.between, 0), text("B", 1), *special(frame.after, 1)],
        "special_tokens": {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in used},
    }


def digit_split(pieces: Sequence[str], specials: Mapping[str, int]) -> dict[str, Any] | None:
    """Return a pre-tokenizer that isolates digits if no piece of the vocabulary joins them, else None.

    Without it, unigram models match a literal `<0x41>` in a text with the byte piece of that name.
    """
    texts = (piece for piece in pieces if len(piece) > 1 and piece not in specials and not is_byte(piece))
    if any(set(piece) & set("0123456789") for piece in texts):
        return None
    return {"type": "Split", "pattern": {"Regex": "[0-9]"}, "behavior": "Isolated", "invert": False}


def merges(pieces: Sequence[str], scores: Sequence[float], specials: Mapping[str, int]) -> list[list[str]]:
    """Return all pairs that merge to a piece, best piece first: sentencepiece merges any pair that gives the best one.

    Source: Kudo and Richardson 2018, arXiv:1808.06226, section 3.1. sentencepiece does not order the pairs of one
    piece; here they are ordered by the ids of their parts.
    """
    rank = {piece: index for index, piece in enumerate(pieces) if piece not in specials and not is_byte(piece)}
    pairs: list[tuple[float, int, int, list[str]]] = []
    for piece, index in rank.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in rank and right in rank:
                pairs.append((-scores[index], rank[left], rank[right], [left, right]))
    pairs.sort(key=lambda entry: entry[:3])
    return [pair for *_, pair in pairs]


def is_byte(piece: str) -> bool:
    """Tell whether a piece is one of the 256 byte pieces."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def added_token(piece: str) -> dict[str, Any]:
    """Return the entry of a special token in Hugging Face's format."""
    return {
        "content": piece,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def tokenizer_config(tokens: Mapping[str, str], specials: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`; `tokens` maps the roles pad, unk, bos, eos, mask to pieces."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": piece for role, piece in tokens.items()},
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        "added_tokens_decoder": {
            str(index): added_token(piece) for piece, index in sorted(specials.items(), key=lambda x: x[1])
        },
    }
