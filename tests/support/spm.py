"""sentencepiece models as they are published, which add a space before the first word, and their tokenizers."""

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from llmctl.tokenizer.sentencepiece_classes import CLASSES


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


TEXT = (
    "the cat sat on a mat and naïve café spoke of 12 strings , 345 67, Hello World ! Ünïcode ist schön . "
    "ein kleiner Frosch fragt seinen Lehrer x = 1"
)
HAN = "猫坐在垫子上今天天气很好我们去公园"


def sentences() -> Iterator[str]:
    """Yield lines of English, German, digits and Chinese."""
    words = TEXT.split()
    for n in range(300):
        yield " ".join(words[(n * 7 + k * k) % len(words)] for k in range(9)) + f" {n}"
        yield HAN[n % 9 :] + HAN[: n % 5] + "。"


def trained(texts: Iterable[str] = (), **options: Any) -> bytes:
    """Return a unigram model with the trainer's own normalization, as most published ones have."""
    out = io.BytesIO()
    settings = {"vocab_size": 220, "model_type": "unigram", "character_coverage": 1.0} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts or sentences()),
        model_writer=out,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return out.getvalue()


T5_SPECIALS: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
BRACKETS = ["[CLS]", "[SEP]", "[MASK]"]
SPECIALS: dict[str, dict[str, Any]] = {
    "T5": T5_SPECIALS,
    "Pegasus": T5_SPECIALS,
    "Albert": {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1, "control_symbols": BRACKETS},
    "BigBird": {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "control_symbols": BRACKETS},
    "DebertaV2": {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    | {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
    "Nllb": {"model_type": "bpe"},
    "Marian": {"bos_id": -1, "eos_id": 0, "unk_id": 1},
}
"""The special pieces with which the models of each class were trained; the others have the trainer's."""


def folder_files(name: str, **config: Any) -> dict[str, bytes]:
    """Return the files of a tiny tokenizer of a published class."""
    kind, options = CLASSES[name], SPECIALS.get(name, {})
    files = {
        kind.model: trained(**options),
        "tokenizer_config.json": json.dumps({"tokenizer_class": f"{name}Tokenizer"} | config).encode(),
    }
    if kind.target:
        files[kind.target] = trained(vocab_size=110, **options)
    if config.get("separate_vocabs"):
        for model, file in ((kind.model, "vocab.json"), (kind.target, "target_vocab.json")):
            processor = sentencepiece.SentencePieceProcessor(model_proto=files[model])
            own = {processor.id_to_piece(index) for index in range(processor.get_piece_size())}
            middle = sorted(own - {"</s>", "<unk>"}, key=lambda piece: piece[::-1])
            vocabulary = ["</s>", "<unk>", "<pad>", *(piece for n, piece in enumerate(middle) if n % 13)]
            files[file] = json.dumps({piece: index for index, piece in enumerate(vocabulary)}).encode()
    elif kind.vocabulary:
        models = [files[file] for file in (kind.model, kind.target) if file]
        own = [sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in models]
        pieces = [model.id_to_piece(index) for model in own for index in range(model.get_piece_size())]
        first = ["<s>", "<pad>", "</s>", "<unk>"] if name == "M2M100" else ["</s>", "<unk>", ">>de<<", ">>fr<<"]
        last = [] if name == "M2M100" else ["<pad>"]
        # The order of a published vocabulary is not that of the pieces, and it lacks some of them.
        middle = sorted({*pieces} - {*first, *last}, key=lambda piece: piece[::-1])
        vocabulary = [*first, *[piece for n, piece in enumerate(middle) if n % 13], *last]
        files["vocab.json"] = json.dumps({piece: index for index, piece in enumerate(vocabulary)}).encode()
    return files
