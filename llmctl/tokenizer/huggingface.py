"""Tokenizers of published models, through Hugging Face's `tokenizers` library.

Reads any `tokenizer.json`; older vocabulary files are converted to one (`vocabulary_files.py`).
"""

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

from llmctl.errors import ArtifactError, LlmctlError, MissingExtraError
from llmctl.files import json_of
from llmctl.tokenizer.base import Frame, Span, SpecialToken, Tokenizer, digest
from llmctl.tokenizer.checks import check_tokenizer, quiet, raise_interrupts, steps_of
from llmctl.tokenizer.long_texts import INNER, Encode, LongTexts, spanning

ROLES = {
    "pad": ("<pad>", "[PAD]", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "[CLS]", "<|im_start|>", "<|endoftext|>"),
    "eos": ("</s>", "[SEP]", "<|im_end|>", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]"),
}
"""The usual tokens of each role; the first one that exists is used if the config names none."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` with its config.

    Raises: MissingExtraError without the `tokenizers` package; ArtifactError for an invalid file.
    """

    def __init__(self, content: bytes, files: Mapping[str, bytes]) -> None:
        tokenizers = tokenizers_module()
        if multiprocessing.parent_process():  # worker processes share the cores: one thread each
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._json = json_of({"tokenizer.json": content}, "tokenizer.json")
        check_tokenizer(self._json)
        with as_artifact_error("`tokenizer.json` cannot be read"), quiet():
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        config = json_of(files, "tokenizer_config.json")
        self._tokenizer.encode_special_tokens = True  # encode special tokens in a text as plain text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._files = dict(files)
        self._content = content
        self.sha256 = digest({"tokenizer.json": content})
        self._added: list[dict[str, Any]] = self._json.get("added_tokens") or []
        added = {entry["content"]: entry["id"] for entry in self._added}
        self._special = {entry["content"]: entry["id"] for entry in self._added if entry.get("special")}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True) | added
        self._pieces = {index: piece for piece, index in vocabulary.items()}
        self.vocab_size = max(self._pieces, default=-1) + 1
        for role, names in ROLES.items():
            setattr(self, f"{role}_id", role_id(role, names, config, vocabulary, self._special))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the files only: each worker process builds its own tokenizer."""
        return HuggingFaceTokenizer, (self._content, self._files)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens."""
        return self._long_texts.encode_batch(texts)

    def cut(self, text: str, n_characters: int) -> list[str]:
        """Cut a text into parts whose ids, one after the other, are those of the text."""
        return self._long_texts.cut(text, n_characters)

    @cached_property
    def _long_texts(self) -> LongTexts:
        def later() -> list[Encode]:
            return [] if self._inner is None else [lambda texts: encode_whole(self._inner, texts)]

        def probes() -> Iterator[str]:
            for index, piece in self._pieces.items():
                if INNER.search(piece):
                    yield from spanning(self.piece_bytes(index).decode("utf-8", "replace") or piece)
            # Added tokens may take the white space around them.
            for entry in self._added:
                token = entry["content"]
                yield from (f"a{left}{token}{right}b" for left in WHITE for right in WHITE)

        kind = str(self._json["model"].get("type", "BPE")).lower()
        return LongTexts(kind, lambda texts: encode_whole(self._tokenizer, texts), later, probes)

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of every text, each with the characters that it stands for."""
        with as_artifact_error(ENCODING):
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_next(self, text: str, *, after_special: bool) -> list[int]:
        """Return the ids of a text that continues another, without the dummy space before its first word.

        After a special token the space is added, except with Metaspace's scheme `first`.
        """
        if self._inner is None or (after_special and '"first"' not in json.dumps(self._json.get("pre_tokenizer"))):
            return self.encode(text)
        with as_artifact_error(ENCODING):
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _inner(self) -> Any:
        """The same tokenizer without the dummy space; None if it adds none."""
        bare = without_prefix(self._json)
        if bare == self._json:
            return None
        tokenizer = tokenizers_module().Tokenizer.from_str(json.dumps(bare))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def frame(self, family: str) -> Frame:
        """Return the special tokens around a text: those of the post-processor.

        A decoder without one adds none, as in transformers.
        """
        found = frame_of(self._json.get("post_processor"))
        if found is None:
            return Frame() if family == "decoder" else super().frame(family)
        if family == "encoder_decoder" and not found.after:
            return found._replace(after=super().frame(family).after)  # sources are trained with an end token
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are omitted."""
        with as_artifact_error("`tokenizer.json` cannot decode these ids"):
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def piece(self, index: int) -> str:
        """Return the piece of an id as written in the vocabulary."""
        return self._pieces.get(index, "")

    def piece_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes of an id, empty for a special token."""
        piece = self.piece(index)
        if piece in self._special or not piece:
            return b""
        # Byte-level BPE maps bytes to printable characters; a piece with any other character was added as plain text.
        if self._kind == "bytes":
            return bytes(self._byte_of[c] for c in piece) if all(c in self._byte_of for c in piece) else piece.encode()
        if self._kind == "words":
            inner = self._json["model"].get("continuing_subword_prefix") or "##"
            return (piece.removeprefix(inner) if piece.startswith(inner) else f" {piece}").encode()
        if self._kind == "suffixes":
            ending = self._json["model"]["end_of_word_suffix"]
            return (piece.removesuffix(ending) + " " if piece.endswith(ending) else piece).encode()
        if len(piece) == 6 and piece.startswith("<0x"):
            with suppress(ValueError):  # `<0xZZ>` is a word
                return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def special_id(self, text: str) -> int | None:
        """Return the id of a special token, None if it does not exist."""
        return self._special.get(text)

    def special_tokens(self) -> dict[str, SpecialToken]:
        """Return all special tokens by name."""
        entries = [entry for entry in self._added if entry.get("special")]
        return {e["content"]: SpecialToken(e["id"], bool(e.get("lstrip")), bool(e.get("rstrip"))) for e in entries}

    @property
    def joins_bytes(self) -> bool:
        """Whether the text of ids is that of their bytes: the decoder neither adds spaces nor changes what it joins."""
        return self._joins_bytes

    @cached_property
    def _joins_bytes(self) -> bool:
        kinds = {str(step.get("type")) for step in steps_of(self._json.get("decoder"), "decoder")} - {"Sequence"}
        if self._kind == "bytes":
            return kinds == {"ByteLevel"}
        return (
            self._kind == "spaces"
            and bool(kinds)
            and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        )

    def files(self) -> dict[str, bytes]:
        """Return the files the tokenizer was loaded from."""
        return dict(self._files)

    @cached_property
    def _kind(self) -> str:
        if self._json["model"].get("type") in ("WordPiece", "WordLevel"):
            return "words"
        if self._json["model"].get("end_of_word_suffix"):
            return "suffixes"
        return (
            "bytes"
            if '"ByteLevel"' in json.dumps([self._json.get("decoder"), self._json.get("pre_tokenizer")])
            else "spaces"
        )

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return {character: byte for byte, character in byte_characters().items()}


WHITE = ("", " ", "\n", "\n ", " \n", "\n\n")


def encode_whole(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of every text, without special tokens."""
    with as_artifact_error(ENCODING):
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def frame_of(processor: Any) -> Frame | None:
    """Return the special tokens that a post-processor of a `tokenizer.json` adds; None if it adds none."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    try:
        if kind == "Sequence":
            return next((found for each in processor["processors"] if (found := frame_of(each)) is not None), None)
        if kind == "TemplateProcessing":
            single, pair = (template_ids(processor, name) for name in ("single", "pair"))
            between = pair[1] if len(pair) == 3 else ()
            return Frame(single[0], between, single[-1]) if len(single) == 2 else None
        if kind in ("BertProcessing", "RobertaProcessing"):
            first, last = (processor["cls"][1],), (processor["sep"][1],)
            return Frame(first, last if kind == "BertProcessing" else last * 2, last)
    except (KeyError, TypeError, IndexError):  # the library has accepted the file, so this is a form unknown here
        return None
    return None


def template_ids(processor: Mapping[str, Any], name: str) -> list[tuple[int, ...]]:
    """Return the special tokens of a template before, between and after its texts."""
    parts: list[tuple[int, ...]] = [()]
    for item in processor[name]:
        if "Sequence" in item:
            parts.append(())
        else:
            parts[-1] += tuple(processor["special_tokens"][item["SpecialToken"]["id"]]["ids"])
    return parts


def without_prefix(part: Any) -> Any:
    """Return a `tokenizer.json`, or a part of it, without the steps that add a space before the first word."""
    if isinstance(part, list):
        return [without_prefix(item) for item in part if not is_prefix(item)]
    if not isinstance(part, dict):
        return part
    keys = ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers")
    new = {key: without_prefix(value) if key in keys else value for key, value in part.items()}
    for key in keys[:2]:
        if is_prefix(new.get(key)):
            new[key] = None
    if part.get("type") == "Metaspace":
        new["prepend_scheme"] = "never"
        new.pop("add_prefix_space", None)  # the older name of the same setting
    if part.get("type") == "ByteLevel":
        new["add_prefix_space"] = False
    return new


def is_prefix(part: Any) -> bool:
    """Tell whether a step of a `tokenizer.json` only prepends a space."""
    return isinstance(part, dict) and part.get("type") == "Prepend"


def text_lines(data: bytes, name: str) -> list[str]:
    """Split one of the files into lines.

    Only LF ends a line: some pieces are characters at which splitlines() would split (U+2028).
    Raises: ArtifactError naming the file and the first byte that is not UTF-8.
    """
    try:
        return data.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"`{name}` is not UTF-8 at byte {error.start}", "download it again") from None


@contextmanager
def as_artifact_error(what: str) -> Iterator[None]:
    """Convert whatever the library raises: bare exceptions, and panics of its Rust code, which are no exceptions.

    Raises: ArtifactError.
    """
    try:
        yield
    except LlmctlError:
        raise
    except BaseException as error:  # noqa: BLE001 - see above
        raise_interrupts(error)
        raise ArtifactError(f"{what}: {str(error)[:300]}", "download it again") from None


ENCODING = "`tokenizer.json` cannot encode this text"


def tokenizers_module() -> Any:
    """Import the `tokenizers` library.

    Raises: MissingExtraError naming the extra.
    """
    try:
        import tokenizers
    except ImportError:
        raise MissingExtraError("reading `tokenizer.json`, `vocab.txt` or `merges.txt`", "tokenizers") from None
    return tokenizers


def role_id(
    role: str,
    names: Sequence[str],
    config: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    special: Mapping[str, int],
) -> int | None:
    """Return the id of a role such as `eos`: the config's token, else the first of `names` that is special."""
    token = config.get(f"{role}_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(token, str) and token in vocabulary:
        return vocabulary[token]
    return next((special[name] for name in names if name in special), None)


def byte_characters() -> dict[int, str]:
    """Return GPT-2's printable character for every byte: the byte itself if printable, else one from U+0100 on.

    Source: Radford et al. 2019, section 2.2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        table.setdefault(byte, chr(0x100 + len(table) - len(printable)))
    return table
