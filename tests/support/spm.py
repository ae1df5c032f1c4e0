"""A sentencepiece model as it is published: it adds a space before the first word, unlike ours."""

import io
from collections.abc import Iterable
from typing import Any

import sentencepiece


def published(texts: Iterable[str], vocab_size: int, **options: Any) -> bytes:
    """Return a BPE model with byte pieces and without normalization."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=out,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()
