"""A tokenizer as the metadata of a GGUF file: the inverse of `gguf_tokenizer.py`.

A sentencepiece BPE model becomes `llama`, a byte-level BPE `tokenizer.json` becomes `gpt2` with the name of its
pre-tokenizer. What llama.cpp would split otherwise is refused: ids that differ are noticed by nobody.
"""

import struct
from collections.abc import Mapping
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.files import parse_json
from llmctl.formats.gguf.tokenizer import BYTE, CONTINUED, CONTROL, NORMAL, UNUSED, USER_DEFINED, WORD_START
from llmctl.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llmctl.tokenizer.protobuf import damaged, fields

EXPORTED = (
    "what is exported: sentencepiece BPE with byte pieces and without normalization, as llmctl trains it, and byte-level "
    f"BPE with the pre-tokenizer of {', '.join(PRE_TOKENIZERS)}"
)
Tokens = list[tuple[str, int]]

# Fields of sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, AS_SUFFIX = 3, 24
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE_SPACES = 2, 3, 4, 5
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def tokenizer_values(
    files: Mapping[str, bytes], vocab_size: int, ids: Mapping[str, int], *, adds_bos: bool, template: str | None
) -> dict[str, Any]:
    """Return the metadata of the tokenizer that these files make up.

    ids: llama.cpp's name of a role (bos, eos, unknown, padding) -> its token. Rows of the embedding without a token get
    unused ones.
    Raises: ArtifactError for a tokenizer that llama.cpp's `llama` and `gpt2` do not express.
    """
    if "tokenizer.model" in files:
        values, tokens = sentencepiece_values(files["tokenizer.model"])
        names = {index: name for index, name in added_names(files).items() if index >= len(tokens)}
    else:
        content = parse_json(files.get("tokenizer.json", b"{}"))
        is_word_pieces = content.get("model", {}).get("type") == "WordPiece"
        values, tokens = word_piece_values(content) if is_word_pieces else byte_level_values(content)
        names = {}
    if len(tokens) > vocab_size:
        raise ArtifactError(
            f"the tokenizer has {len(tokens):,} tokens, the model {vocab_size:,} rows for them",
            "use the tokenizer that the model was trained with",
        )
    for index in range(len(tokens), vocab_size):
        tokens.append((names[index], CONTROL) if index in names else (f"[PAD{index}]", UNUSED))
    values |= {"tokens": [token for token, _ in tokens], "token_type": [kind for _, kind in tokens]}
    if "scores" in values:
        values["scores"] += [0.0] * (vocab_size - len(values["scores"]))
    values |= {f"{role}_token_id": index for role, index in ids.items()}
    if values["model"] != "bert":
        values |= {"add_bos_token": adds_bos, "add_eos_token": False}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return metadata | {"tokenizer.chat_template": template} if template else metadata


def refuse(what: str) -> ArtifactError:
    """Return the error for a tokenizer that is not exported."""
    return ArtifactError(f"the tokenizer {what}, which is not exported as GGUF", EXPORTED)


def added_names(files: Mapping[str, bytes]) -> dict[int, str]:
    """Return id -> name of the tokens that tokenizer_config.json puts behind a sentencepiece model."""
    try:
        added = parse_json(files.get("tokenizer_config.json", b"{}")).get("added_tokens_decoder", {})
        return {int(index): str(token["content"]) for index, token in added.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


# --- sentencepiece ---------------------------------------------------------------------------------------------------


def sentencepiece_values(proto: bytes) -> tuple[dict[str, Any], Tokens]:
    """Return the metadata and the tokens, with their types, of a sentencepiece model.

    Source: sentencepiece_model.proto of google/sentencepiece; its defaults hold where a field is missing.
    """
    tokens: Tokens = []
    scores: list[float] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in fields(proto):
            if number == PIECES:
                piece: dict[int, Any] = dict(fields(as_message(value)))
                tokens.append((piece[PIECE].decode(), piece.get(TYPE, NORMAL)))
                scores.append(struct.unpack("<f", piece[SCORE])[0] if SCORE in piece else 0.0)
            elif number in (TRAINER, NORMALIZER):
                (trainer if number == TRAINER else normalizer).update(fields(as_message(value)))
    except (ValueError, KeyError, AttributeError, struct.error) as error:
        raise damaged(f"a piece cannot be read ({error})") from None
    check_sentencepiece(trainer, normalizer, {kind for _, kind in tokens})
    prefix = bool(normalizer.get(DUMMY_PREFIX, 1))
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}, tokens


def as_message(value: int | bytes) -> bytes:
    """Return the bytes of a field that is a message.

    Raises: ArtifactError for an integer.
    """
    if isinstance(value, bytes):
        return value
    raise damaged("a message is an integer")


def check_sentencepiece(trainer: Mapping[int, Any], normalizer: Mapping[int, Any], kinds: set[int]) -> None:
    """Refuse what llama.cpp does otherwise.

    Raises: ArtifactError.
    """
    kind = MODEL_TYPES.get(trainer.get(MODEL_TYPE, 1), "unknown")
    if kind not in ("bpe", "char"):
        raise refuse(f"is a sentencepiece model of the type {kind}")
    if normalizer.get(CHARSMAP) or normalizer.get(EXTRA_SPACES, 1) or not normalizer.get(ESCAPE_SPACES, 1):
        raise refuse("is a sentencepiece model that changes the text (normalization, or spaces taken out)")
    if trainer.get(AS_SUFFIX):
        raise refuse("is a sentencepiece model that ends words with spaces")
    if BYTE not in kinds:
        raise refuse("is a sentencepiece model without byte pieces")


# --- WordPiece -------------------------------------------------------------------------------------------------------

ROLES = {"[CLS]": ("bos", "cls"), "[SEP]": ("eos", "seperator"), "[MASK]": ("mask",), "[UNK]": ("unknown",)}
"""llama.cpp's roles of BERT's special tokens, in its own spelling."""


def word_piece_values(tokenizer: Mapping[str, Any]) -> tuple[dict[str, Any], Tokens]:
    """Return the metadata and the tokens, with their types, of BERT's `tokenizer.json`.

    llama.cpp marks the beginnings of words instead of their continuations.
    Raises: ArtifactError for settings that llama.cpp does not have.
    """
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    is_bert = normalizer.get("type") == "BertNormalizer" and normalizer.get("handle_chinese_chars")
    cuts = (tokenizer.get("pre_tokenizer") or {}).get("type")
    if not is_bert or cuts != "BertPreTokenizer" or model.get("continuing_subword_prefix") != CONTINUED:
        raise refuse("is a WordPiece tokenizer with other settings than BERT's")
    added = {token["content"] for token in tokenizer.get("added_tokens", [])}
    vocabulary = {index: token for token, index in model["vocab"].items()}
    if any(role not in model["vocab"] for role in ("[CLS]", "[SEP]", "[UNK]")) or sorted(vocabulary) != [
        *range(len(vocabulary))
    ]:
        raise refuse("lacks special tokens or ids of BERT")
    tokens = [
        (token, CONTROL)
        if token in added or (token[:1] == "[" and token[-1:] == "]")
        else (token.removeprefix(CONTINUED) if token.startswith(CONTINUED) else WORD_START + token, NORMAL)
        for _, token in sorted(vocabulary.items())
    ]
    lower, strip = bool(normalizer.get("lowercase")), normalizer.get("strip_accents")
    values: dict[str, Any] = {"model": "bert", "pre": "default"}
    values |= {"normalizer.lowercase": lower, "normalizer.strip_accents": lower if strip is None else bool(strip)}
    for token, roles in ROLES.items():
        if token in model["vocab"]:
            values |= {f"{role}_token_id": model["vocab"][token] for role in roles}
    return values, tokens


# --- byte-level BPE --------------------------------------------------------------------------------------------------


def byte_level_values(tokenizer: Mapping[str, Any]) -> tuple[dict[str, Any], Tokens]:
    """Return the metadata and the tokens, with their types, of a byte-level BPE `tokenizer.json`."""
    model, added = tokenizer.get("model", {}), tokenizer.get("added_tokens", [])
    pre = pre_tokenizer_name(tokenizer)
    changed = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if changed or model.get("byte_fallback"):
        raise refuse(f"has the setting `{(*changed, 'byte_fallback')[0]}`")
    if any(token.get(key) for token in added for key in ("single_word", "lstrip", "rstrip")):
        raise refuse("has special tokens that swallow the space beside them")
    kinds = dict.fromkeys(model["vocab"], NORMAL)
    kinds |= {token["content"]: CONTROL if token.get("special") else USER_DEFINED for token in added}
    places = {index: token for token, index in model["vocab"].items()} | {t["id"]: t["content"] for t in added}
    tokens = [
        (places[index], kinds[places[index]]) if index in places else (f"[PAD{index}]", UNUSED)
        for index in range(max(places) + 1)
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges:
        raise refuse("has no merges")
    return {"model": "gpt2", "pre": pre, "merges": merges}, tokens


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how a text is cut before pieces are merged.

    Raises: ArtifactError for a way that has none here.
    """
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE" or (tokenizer.get("decoder") or {}).get("type") != "ByteLevel":
        raise refuse(f"is a `tokenizer.json` of the kind {model.get('type')}, not byte-level BPE")
    found = steps_of(tokenizer.get("pre_tokenizer")), steps_of(tokenizer.get("normalizer"))
    for name, row in PRE_TOKENIZERS.items():
        is_same = found == (steps_of(row.steps), steps_of(row.normalizer))
        if is_same and bool(model.get("ignore_merges")) == row.ignore_merges:
            return name
    raise refuse("cuts words in a way of its own")


def steps_of(part: Mapping[str, Any] | None) -> list[Any]:
    """Return the steps of a pre-tokenizer or normalizer without what does not change the ids."""
    if not part:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers", part.get("normalizers", []))
        return [step for each in inner for step in steps_of(each)]
    step = {key: value for key, value in part.items() if key != "trim_offsets"}
    return [{"use_regex": True} | step] if part["type"] == "ByteLevel" else [step]
