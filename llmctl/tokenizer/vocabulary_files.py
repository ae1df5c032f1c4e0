"""Tokenizers of older models, from `vocab.txt` or `vocab.json` with `merges.txt`, as their class builds them.

The class in `tokenizer_config.json` and its settings say how a text is cut, which the vocabulary does not tell. A class
that is not known here is refused: its ids would differ in silence.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.files import json_of
from llmctl.tokenizer.checks import check_ids, quiet
from llmctl.tokenizer.huggingface import (
    HuggingFaceTokenizer,
    as_artifact_error,
    text_lines,
    tokenizers_module,
)
from llmctl.tokenizer.pre_tokenizers import PRE_TOKENIZERS

WORD_PIECES = ("Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "LayoutLM", "Retribert", "Funnel")
GPT2, ROBERTA, QWEN2 = ("GPT2",), ("Roberta", "Bart", "Longformer", "LED"), ("Qwen2",)
ANY = ("", "PreTrained")
"""No class, or one that only reads `tokenizer.json`: the first kind of the vocabulary's format is meant."""

SPECIAL = re.compile(r"<\|.*\|>|\[[A-Z]+\]")

log = logging.getLogger(__name__)


def class_of(config: Mapping[str, Any]) -> str:
    """Return the name of the tokenizer's class without its ending."""
    return str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")


def refuse(name: str, config: Mapping[str, Any], known: tuple[str, ...]) -> ArtifactError:
    """Return the error for a class that builds its tokenizer in a way of its own."""
    return ArtifactError(
        f"`{str(config.get('tokenizer_class'))[:60]}` reads `{name}` in a way of its own, which llmctl does not support",
        f"supported: {', '.join(known)}; or save it as `tokenizer.json` with transformers: "
        "AutoTokenizer.from_pretrained(X).save_pretrained(X)",
    )


def from_word_pieces(vocabulary: bytes, files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
    """Build BERT's tokenizer from `vocab.txt`, with the settings of its config.

    Raises: ArtifactError if the file is not a WordPiece vocabulary, or its class is not BERT's.
    Source: Devlin et al. 2019, arXiv:1810.04805.
    """
    tokenizers, config = tokenizers_module(), json_of(files, "tokenizer_config.json")
    if class_of(config) not in (*WORD_PIECES, *ANY):
        raise refuse("vocab.txt", config, WORD_PIECES)
    pieces = checked_lines(text_lines(vocabulary, "vocab.txt"))
    model = tokenizers.models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=100)  # noqa: S106
    tokenizer = tokenizers.Tokenizer(model)
    strip_accents = config.get("strip_accents")
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=strip_accents if isinstance(strip_accents, bool) else None,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in pieces])
    if "[CLS]" in pieces and "[SEP]" in pieces:
        ends = ("[SEP]", pieces["[SEP]"]), ("[CLS]", pieces["[CLS]"])
        tokenizer.post_processor = tokenizers.processors.BertProcessing(*ends)
    return finished(tokenizer, config, files)


def checked_lines(lines: list[str]) -> dict[str, int]:
    """Return token -> id of the lines of `vocab.txt`; suspicious lines are logged.

    Raises: ArtifactError for a file that is no WordPiece vocabulary.
    """
    lines = [line.removesuffix("\r") for line in lines]
    if lines[0].startswith("\ufeff"):
        raise ArtifactError(
            "`vocab.txt` begins with a byte order mark", "remove it: sed -i '1s/^\\xef\\xbb\\xbf//' vocab.txt"
        )
    pieces: dict[str, int] = {}
    for index, line in enumerate(lines):
        if not line.strip():
            log.warning("line %d of `vocab.txt` is blank: its id %d stands for no text", index + 1, index)
        elif line in pieces:
            log.warning("line %d of `vocab.txt` repeats line %d: `%s`", index + 1, pieces[line] + 1, line[:40])
        pieces[line] = index
    if "[UNK]" not in pieces:
        raise ArtifactError("`vocab.txt` is not a WordPiece vocabulary: it has no `[UNK]`", "download it again")
    return pieces


def from_merges(vocabulary: bytes, merges: bytes, files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
    """Build the byte-level BPE tokenizer of GPT-2, BART, RoBERTa or Qwen from its vocabulary and merges.

    Raises: ArtifactError if they are damaged or do not match, or belong to another class.
    Source: Radford et al. 2019.
    """
    tokenizers, config = tokenizers_module(), json_of(files, "tokenizer_config.json")
    kind = class_of(config)
    if kind not in (*GPT2, *ROBERTA, *QWEN2, *ANY):
        raise refuse("vocab.json", config, (*GPT2, *ROBERTA, *QWEN2))
    lines = [line.removesuffix("\r") for line in text_lines(merges, "merges.txt")]
    pairs = [
        (left, right)
        for left, _, right in (line.partition(" ") for line in lines if line and not line.startswith("#version"))
    ]
    pieces = json_of({"vocab.json": vocabulary}, "vocab.json")
    check_ids(pieces, "vocab.json")
    with as_artifact_error("`vocab.json` and `merges.txt` do not form a valid tokenizer"), quiet():
        model = tokenizers.models.BPE(pieces, pairs)
    tokenizer = tokenizers.Tokenizer(model)
    parts = tokenizers.pre_tokenizers
    prefix = bool(config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = parts.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    specials: list[Any] = ["<|endoftext|>"]
    if kind in QWEN2:
        words = PRE_TOKENIZERS["qwen2"].steps["pretokenizers"][0]["pattern"]["Regex"]
        split = parts.Split(tokenizers.Regex(words), "isolated")
        tokenizer.pre_tokenizer = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    elif kind in ROBERTA or (kind in ANY and "<|endoftext|>" not in pieces and "</s>" in pieces):
        ends = [(token, pieces[token]) for token in ("</s>", "<s>") if token in pieces]
        if len(ends) != 2:
            raise ArtifactError("`vocab.json` has no `<s>` and `</s>`, which its class needs", "download it again")
        tokenizer.post_processor = tokenizers.processors.RobertaProcessing(*ends, add_prefix_space=prefix)
        # The mask takes the space before it.
        specials = ["<s>", "</s>", "<pad>", "<unk>", tokenizers.AddedToken("<mask>", lstrip=True, special=True)]
        specials = [token for token in specials if str(getattr(token, "content", token)) in pieces]
    tokenizer.add_special_tokens(specials)
    return finished(tokenizer, config, files)


def finished(tokenizer: Any, config: Mapping[str, Any], files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
    """Add the tokens that stand beside the vocabulary, and return the tokenizer.

    Raises: ArtifactError for an added token whose id is not the next one.
    """
    module = tokenizers_module()
    for index, entry in sorted(added_tokens(config, files).items()):
        content, special = entry["content"], bool(entry.get("special", True))
        options = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        token = module.AddedToken(content, special=special, **options)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(content) != index:
            raise ArtifactError(
                f"the added token `{content[:40]}` has the id {index}, but {tokenizer.token_to_id(content)} is the next one",
                "save the tokenizer as `tokenizer.json` with transformers",
            )
    content = tokenizer.to_str().encode()
    return HuggingFaceTokenizer(content, {**files, "tokenizer.json": content})


def added_tokens(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[int, dict[str, Any]]:
    """Return id -> entry of the tokens in `added_tokens.json` and in `added_tokens_decoder` of the config.

    The older `added_tokens.json` does not say which are special: those written like `<|im_end|>` or `[SEP]`, and those
    that the config names.

    Raises: ArtifactError if they are damaged.
    """
    listed = json_of(files, "added_tokens.json")
    check_ids(listed, "added_tokens.json")
    named = json.dumps([config, json_of(files, "special_tokens_map.json")], ensure_ascii=False)
    found: dict[int, dict[str, Any]] = {
        index: {"content": content, "special": bool(SPECIAL.fullmatch(content)) or json.dumps(content) in named}
        for content, index in listed.items()
    }
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ArtifactError(
            f"`added_tokens_decoder` in `tokenizer_config.json` is a {type(decoder).__name__}, not an object",
            "download it again",
        )
    for index, entry in decoder.items():
        if not index.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ArtifactError(
                f"`added_tokens_decoder` in `tokenizer_config.json` has a damaged entry `{index[:40]}`",
                "download it again",
            )
        check_ids({entry["content"]: int(index)}, "tokenizer_config.json")
        found[int(index)] = entry
    return found
