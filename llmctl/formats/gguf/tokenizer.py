"""The tokenizer inside a GGUF file as the files that a Hugging Face folder has.

A `llama` tokenizer becomes `tokenizer.model` (a sentencepiece BPE model, its protocol buffer written here field by
field), a `gpt2` one `tokenizer.json` (byte-level BPE). A pre-tokenizer that is not known is refused: with another
one the ids would be wrong without anybody noticing.
"""

import json
import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from llmctl.errors import ArtifactError
from llmctl.files import json_text
from llmctl.formats.gguf.container import DAMAGED
from llmctl.tokenizer.pre_tokenizers import BYTE_LEVEL, PRE_TOKENIZERS
from llmctl.tokenizer.sentencepiece import ALWAYS_PREFIX

T = TypeVar("T")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WORD_START, CONTINUED = "\u2581", "##"
"""Marks of a word's first piece in llama.cpp, and of the others in BERT."""


def tokenizer_files(metadata: Mapping[str, Any], vocab_size: int, max_positions: int) -> dict[str, bytes]:
    """Return the tokenizer's files: the tokenizer, tokenizer_config.json, and the chat template where there is one.

    Raises: ArtifactError for a tokenizer that is not read or does not fit the vocabulary.
    """
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    values.setdefault("add_bos_token", adds_bos(values))
    kind, tokens, types = values.get("model"), values.get("tokens"), values.get("token_type")
    if not is_list(tokens, str) or len(tokens) != vocab_size:
        found = len(tokens) if isinstance(tokens, list) else 0
        raise ArtifactError(f"the GGUF file has {found} tokens for an embedding of {vocab_size} rows", DAMAGED)
    repeated = next((token for token, count in Counter(tokens).items() if count > 1), None)
    if repeated is not None:
        places = [index for index, token in enumerate(tokens) if token == repeated]
        raise ArtifactError(
            f"the GGUF file has the token {repeated[:40]!r} twice, with the ids {places[0]} and {places[1]}", DAMAGED
        )
    types = types if types is not None else [1] * vocab_size
    if not is_list(types, int) or len(types) != vocab_size:
        raise ArtifactError("`tokenizer.ggml.token_type` of the GGUF file does not fit its tokens", DAMAGED)
    if kind == "llama":
        files = {"tokenizer.model": sentencepiece_model(values, tokens, types)}
    elif kind == "gpt2":
        files = {"tokenizer.json": byte_level_json(values, tokens, types).encode()}
    elif kind == "bert":
        return word_piece_files(values, tokens, types, max_positions)
    else:
        known = "what is read: llama (sentencepiece BPE), gpt2 (byte-level BPE), bert (WordPiece)"
        raise ArtifactError(f"the GGUF file has the tokenizer `{str(kind)[:60]}`, which llmctl does not read", known)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    config = tokenizer_config(values, tokens, max_positions, template, sentencepiece=kind == "llama")
    if kind == "llama":
        config |= split_config(tokens, types, has_prefix=config["add_prefix_space"])
    return files | {"tokenizer_config.json": json_text(config).encode()}


def word_piece_files(
    values: Mapping[str, Any], tokens: list[str], types: list[int], max_positions: int
) -> dict[str, bytes]:
    """Return the files of BERT's tokenizer; llama.cpp marks the beginnings of words instead of their continuations.

    Raises: ArtifactError for a token that stands in two lines.
    """
    lines = [
        token
        if kind == CONTROL or (token[:1] == "[" and token[-1:] == "]")
        else token.removeprefix(WORD_START)
        if token.startswith(WORD_START)
        else CONTINUED + token
        for token, kind in zip(tokens, types, strict=True)
    ]
    if any("\n" in line for line in lines) or len(set(lines)) < len(lines):
        raise ArtifactError("the GGUF file has WordPiece tokens that are not lines of a vocabulary", DAMAGED)
    lower = bool(values.get("normalizer.lowercase", True))
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower,
        "strip_accents": bool(values.get("normalizer.strip_accents", lower)),
        "tokenize_chinese_chars": True,
        "model_max_length": max_positions,
    }
    return {"vocab.txt": "\n".join([*lines, ""]).encode(), "tokenizer_config.json": json_text(config).encode()}


def adds_bos(values: Mapping[str, Any]) -> bool:
    """Tell whether llama.cpp begins texts with BOS if the file does not say: by the kind of tokenizer."""
    row = PRE_TOKENIZERS.get(str(values.get("pre")))
    return values.get("model") == "llama" or (row is not None and row.adds_bos)


def is_list(value: Any, kind: type[T]) -> TypeGuard[list[T]]:
    """Say whether this is a list of things of one type."""
    return isinstance(value, list) and all(type(item) is kind for item in value)


def token_id(values: Mapping[str, Any], name: str, n_tokens: int) -> int:
    """Return the id of a special token, or -1.

    Raises: ArtifactError when it is not an id of the vocabulary.
    """
    value = values.get(f"{name}_token_id", -1)
    if type(value) is not int or not -1 <= value < n_tokens:
        raise ArtifactError(f"`tokenizer.ggml.{name}_token_id` of the GGUF file is {str(value)[:40]}", DAMAGED)
    return value


def tokenizer_config(
    values: Mapping[str, Any],
    tokens: list[str],
    max_positions: int,
    template: Any,
    *,
    sentencepiece: bool,
) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = token_id(values, key, len(tokens))
        if index >= 0:
            config[f"{name}_token"] = tokens[index]
    config |= {
        "add_bos_token": bool(values["add_bos_token"]),
        "add_eos_token": bool(values.get("add_eos_token", False)),
        "add_prefix_space": bool(values.get("add_space_prefix", sentencepiece)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    return config | {"chat_template": template} if isinstance(template, str) else config


def split_config(tokens: list[str], types: list[int], *, has_prefix: bool) -> dict[str, Any]:
    """Return the entries of tokenizer_config.json for what llama.cpp does with a text before sentencepiece's merges.

    It splits the text at user-defined tokens, and puts the dummy space before each of the other parts. `legacy` is the
    same in transformers, but for parts that begin with a space.
    """
    added = {
        str(index): added_entry(token, special=False)
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == USER_DEFINED and token
    }
    config: dict[str, Any] = {"legacy": True, ALWAYS_PREFIX: True} if has_prefix else {}
    return config | ({"added_tokens_decoder": added} if added else {})


def added_entry(token: str, *, special: bool) -> dict[str, Any]:
    """Return the entry of an added token in Hugging Face's files."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **flags, "special": special}


def byte_level_json(values: Mapping[str, Any], tokens: list[str], types: list[int]) -> str:
    """Return tokenizer.json of a byte-level BPE tokenizer.

    Raises: ArtifactError when the pre-tokenizer is not known or the merges are not pairs.
    """
    pre, merges = values.get("pre"), values.get("merges")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        known = f"what is read: {', '.join(PRE_TOKENIZERS)}"
        raise ArtifactError(f"the GGUF file has the pre-tokenizer `{str(pre)[:60]}`, which llmctl does not read", known)
    if not is_list(merges, str):
        raise ArtifactError("the GGUF file has no `tokenizer.ggml.merges`", DAMAGED)
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ArtifactError("`tokenizer.ggml.merges` of the GGUF file has an entry that is not two tokens", DAMAGED)
    added = [
        {"id": index, **added_entry(tokens[index], special=kind == CONTROL)}
        for index, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    bos = token_id(values, "bos", len(tokens)) if values["add_bos_token"] else -1
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": PRE_TOKENIZERS[pre].normalizer,
        "pre_tokenizer": PRE_TOKENIZERS[pre].steps,
        "post_processor": begin_with(tokens[bos], bos) if bos >= 0 else None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": PRE_TOKENIZERS[pre].ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": pairs,
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False)


def begin_with(token: str, index: int) -> dict[str, Any]:
    """Return the post-processor that sets a token before each text."""
    special, text, pair = {"SpecialToken": {"id": token, "type_id": 0}}, sequence("A", 0), sequence("B", 1)
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, pair],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def sequence(name: str, type_id: int) -> dict[str, Any]:
    """Return the place of a text in a post-processor's template."""
    return {"Sequence": {"id": name, "type_id": type_id}}


def sentencepiece_model(values: Mapping[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """Return a sentencepiece BPE model as its protocol buffer.

    Source: sentencepiece_model.proto of google/sentencepiece: ModelProto {1 pieces, 2 trainer_spec,
    3 normalizer_spec}, SentencePiece {1 piece, 2 score, 3 type}.

    Raises: ArtifactError when the scores do not fit the tokens.
    """
    scores = values.get("scores")
    if not is_list(scores, float) or len(scores) != len(tokens):
        raise ArtifactError("`tokenizer.ggml.scores` of the GGUF file does not fit its tokens", DAMAGED)
    pieces = b"".join(
        field_bytes(1, field_bytes(1, token.encode()) + field_float(2, score) + field_int(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = field_int(3, 2) + field_int(4, len(tokens)) + field_int(35, int(BYTE in types))
    unknown = types.index(UNKNOWN) if UNKNOWN in types else -1
    ids = [unknown, *(token_id(values, name, len(tokens)) for name in ("bos", "eos", "padding"))]
    trainer += b"".join(field_int(40 + place, index) for place, index in enumerate(ids))
    trainer += b"".join(
        field_bytes(45 + place, tokens[index].encode()) for place, index in enumerate(ids) if index >= 0
    )
    prefix = int(bool(values.get("add_space_prefix", True)))
    normalizer = field_bytes(1, b"identity") + field_int(3, prefix) + field_int(4, 0) + field_int(5, 1)
    return pieces + field_bytes(2, trainer) + field_bytes(3, normalizer)


def varint(value: int) -> bytes:
    """Return a protocol buffer's variable-length integer; negative ones take ten bytes."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field_int(number: int, value: int) -> bytes:
    """Return an integer field."""
    return varint(number << 3) + varint(value)


def field_float(number: int, value: float) -> bytes:
    """Return a float32 field."""
    return varint(number << 3 | 5) + struct.pack("<f", value)


def field_bytes(number: int, value: bytes) -> bytes:
    """Return a field of bytes: a string or a message."""
    return varint(number << 3 | 2) + varint(len(value)) + value
