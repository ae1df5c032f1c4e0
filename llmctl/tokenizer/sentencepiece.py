"""sentencepiece tokenizers: our own, and the `.model` files of published models."""

import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.files import parse_json, recognized
from llmctl.tokenizer.base import Frame, Span, SpecialToken, Tokenizer, digest
from llmctl.tokenizer.checks import MAX_GROWTH, longest_text
from llmctl.tokenizer.export import post_processor, tokenizer_config, tokenizer_json
from llmctl.tokenizer.long_texts import INNER, Encode, LongTexts, spanning
from llmctl.tokenizer.protobuf import fields

SPACE = "\u2581"
"""sentencepiece's symbol for a space; a U+2581 in a user's text would be decoded as a space."""

MODEL_FILE = "tokenizer.model"
ALWAYS_PREFIX = "llama_cpp_prefix"
"""The key of `tokenizer_config.json` for llama.cpp's dummy space: before every text after a special or added token."""

PIECES = 1
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec { add_dummy_prefix: false }` (field 3 of field 3); in a protocol buffer the last value wins."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    With byte fallback, a U+2581 in the text is encoded as its three bytes. If the model also does not normalize and
    adds no dummy prefix, as our own, `decode(encode(x)) == x` for every string.
    Raises: ArtifactError if the bytes are not a sentencepiece model.
    """

    def __init__(self, proto: bytes, extra_files: dict[str, bytes] | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        if not proto:  # the library accepts this as a model to be loaded later, with a message on stderr
            raise ArtifactError(f"`{MODEL_FILE}` is empty", "download it again")
        check_tables(proto)
        try:
            self._processor = SentencePieceProcessor(model_proto=proto)
            self.vocab_size = self._processor.get_piece_size()
        except (RuntimeError, ValueError, OSError) as error:
            if (known := recognized(proto[:512])) is not None:
                raise ArtifactError(f"`{MODEL_FILE}` is not a sentencepiece model, but {known[0]}", known[1]) from None
            raise not_a_model(error) from None
        if self.vocab_size == 0:
            raise ArtifactError(f"`{MODEL_FILE}` is not a sentencepiece model: it has no pieces", "download it again")
        self._proto = proto
        self._extra = extra_files or {}
        self.sha256 = digest({MODEL_FILE: proto})
        processor = self._processor
        ids = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = (index if index >= 0 else None for index in ids)
        try:
            self._probe()
        except (ValueError, RuntimeError, IndexError) as error:  # a piece that is not UTF-8, an id that is no piece
            raise not_a_model(error) from None

    def _probe(self) -> None:
        """Find out what the model does with spaces: the library does not expose the normalizer's settings."""
        processor = self._processor
        self.mask_id = self.special_id("<mask>")
        self._space_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._has_bytes = all(processor.is_byte(index) for index in self._space_bytes)
        first = processor.encode("a")
        self._prefix = bool(first) and self.piece(first[0]).startswith(SPACE)
        probe = "  a\tb \n"
        self.is_lossless = self._has_bytes and not self._prefix and processor.decode(processor.encode(probe)) == probe

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the files only: each worker process builds its own tokenizer."""
        return SentencePieceTokenizer, (self._proto, self._extra)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens."""
        return self._long_texts.encode_batch([text if isinstance(text, str) else str(text) for text in texts])

    def cut(self, text: str, n_characters: int) -> list[str]:
        """Cut a text into parts whose ids, one after the other, are those of the text."""
        return self._long_texts.cut(text, n_characters)

    @cached_property
    def _long_texts(self) -> LongTexts:
        def later() -> list[Encode]:
            return [lambda texts: self._encode_whole(texts, self._inner)] if self._prefix else []

        def probes() -> Iterator[str]:
            for piece in self._processor.id_to_piece(list(range(self.vocab_size))):
                if INNER.search(piece):
                    yield from spanning(piece.replace(SPACE, " "))

        return LongTexts("bpe" if is_bpe(self._proto) else "", self._encode_whole, later, probes)

    def _encode_whole(self, texts: Sequence[str], processor: Any = None) -> list[list[int]]:
        batch = list(texts)
        processor = processor or self._processor
        # A single text is encoded without threads: starting one takes longer than encoding a line.
        ids: list[list[int]] = (
            [processor.encode(batch[0])]
            if len(batch) == 1
            else processor.encode(batch, num_threads=n_threads(len(batch)))
        )
        if self.is_lossless:
            for index, text in enumerate(batch):
                if SPACE in text:
                    ids[index] = self._encode_around_spaces(text)
        return ids

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of every text, each with the characters that it stands for; the bytes of one share it."""
        return [self._with_spans(text) for text in texts]

    def _with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        parts = text.split(SPACE) if self.is_lossless else [text]
        ids: list[int] = []
        spans: list[Span] = []
        at = 0
        for number, part in enumerate(parts):
            if number:
                ids += self._space_bytes
                spans += [(at, at + 1)] * len(self._space_bytes)
                at += 1
            pieces = spans_of(self._processor.encode(part, out_type="serialized_proto"), part)
            ids += [index for index, _ in pieces]
            begin = end = at + len(part)
            found: list[Span] = []
            # Of the bytes of a character only the last has its span: the others are empty, before it.
            for index, span in reversed(pieces):
                if span[0] < span[1] or not self._processor.is_byte(index):
                    begin, end = at + span[0], at + span[1]
                found.append((begin, end))
            spans += reversed(found)
            at += len(part)
        return ids, spans

    def named_pieces(self, texts: Sequence[str], threads: int) -> list[list[str]]:
        """Return the pieces of every text by name; unknown text is a piece of its own."""
        found: list[list[str]] = self._processor.encode(list(texts), out_type=str, num_threads=threads) if texts else []
        return found

    def _encode_around_spaces(self, text: str) -> list[int]:
        out: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            out += self._space_bytes if number else []
            out += self._processor.encode(part)
        return out

    def encode_next(self, text: str, *, after_special: bool) -> list[int]:
        """Return the ids of a text that continues another, without the dummy space before its first word.

        After a special token the space is added if `tokenizer_config.json` sets `legacy`, as in transformers, which does
        not add it before a space; as in llama.cpp, from where the file says so, it is added before every text.
        """
        if not self._prefix or (after_special and self._config.get(ALWAYS_PREFIX) is True):
            return self.encode(text)
        adds_space = after_special and self._config.get("legacy") is True and not text.startswith(" ")
        ids: list[int] = self._inner.encode(f" {text}" if adds_space else text)
        return ids

    @cached_property
    def _inner(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._proto + NO_DUMMY_PREFIX)

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            config = parse_json(self._extra.get("tokenizer_config.json", b"{}"))
        except ValueError:
            return {}
        return config if isinstance(config, dict) else {}

    def frame(self, family: str) -> Frame:
        """Return the special tokens around a text; `add_bos_token` may take BOS from a published decoder's."""
        if family == "decoder" and not self.is_lossless and self._config.get("add_bos_token") is False:
            return Frame()
        return super().frame(family)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are omitted, invalid UTF-8 becomes U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._prefix else text

    def piece(self, index: int) -> str:
        """Return the piece of an id as written in the vocabulary."""
        try:
            piece: str = self._processor.id_to_piece(index)
        except UnicodeDecodeError:
            raise ArtifactError(f"piece {index} of `{MODEL_FILE}` is not UTF-8", "download it again") from None
        return piece

    def piece_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes of an id, empty for a special token."""
        processor, piece = self._processor, self.piece(index)
        if processor.is_byte(index):
            return bytes([int(piece[3:5], 16)]) if BYTE.fullmatch(piece) else piece.encode()
        if processor.is_control(index):
            return b""
        if processor.is_unknown(index):
            return b"" if self._has_bytes else "\u2047".encode()
        return piece.replace(SPACE, " ").encode()

    def special_id(self, text: str) -> int | None:
        """Return the id of a control piece, None if it does not exist."""
        index = int(self._processor.piece_to_id(text))  # the unknown id if there is no such piece
        known = self._processor.id_to_piece(index) == text
        special = self._processor.is_control(index) or self._processor.is_unknown(index)
        return index if known and special else None

    def specials(self) -> dict[str, int]:
        """Return the special pieces with their ids, which our own models have at the start of the vocabulary."""
        pieces = {self.piece(index): index for index in range(min(self.vocab_size, 4096))}
        return {piece: index for piece, index in pieces.items() if self.special_id(piece) is not None}

    def special_tokens(self) -> dict[str, SpecialToken]:
        """Return all control pieces and the unknown piece by name."""
        return dict(self._controls)

    @cached_property
    def _controls(self) -> dict[str, SpecialToken]:
        processor = self._processor
        ids = [i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
        return {self.piece(index): SpecialToken(index) for index in ids}

    def scored_pieces(self) -> list[tuple[str, float]]:
        """Return all pieces with their scores, in id order."""
        return [(self.piece(index), float(self._processor.get_score(index))) for index in range(self.vocab_size)]

    def files(self) -> dict[str, bytes]:
        """Return the model file; for our own models also the files of Hugging Face's tokenizers."""
        files = {MODEL_FILE: self._proto, **self._extra}
        specials = self.specials() if self.is_lossless else {}
        # Without a piece for unknown text, which our own models have, there is no equal tokenizer of Hugging Face's.
        if any("unk" in piece for piece in specials) and "tokenizer.json" not in files:
            files["tokenizer.json"] = as_json(tokenizer_json(self.scored_pieces(), specials, self._is_unigram()))
        if self.is_lossless and "tokenizer_config.json" not in files:
            names = {
                "pad": self.pad_id,
                "unk": self.unk_id,
                "bos": self.bos_id,
                "eos": self.eos_id,
                "mask": self.mask_id,
            }
            tokens = {role: self.piece(index) for role, index in names.items() if index is not None}
            files["tokenizer_config.json"] = as_json(tokenizer_config(tokens, self.specials()))
        return files

    def files_for(self, family: str) -> dict[str, bytes]:
        """Return the files as they belong to a model of a family: other programs add the same special tokens as we do.

        The files of published models stay as they are.
        """
        files = self.files()
        if not self.is_lossless:
            return files
        frame = self.frame(family)
        names = {index: self.piece(index) for index in {*frame.before, *frame.between, *frame.after}}
        added = {"post_processor": post_processor(frame, names)}
        flags: dict[str, Any] = {"add_bos_token": bool(frame.before), "add_eos_token": bool(frame.after)}
        if "tokenizer.json" not in self._extra:  # transformers' other classes would change what our file says of spaces
            flags["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name, changes in (("tokenizer.json", added), ("tokenizer_config.json", flags)):
            files[name] = as_json(json.loads(files[name]) | changes)
        return files

    def _is_unigram(self) -> bool:
        # A BPE model's scores are minus the rank of the merge, a unigram's are log-probabilities.
        scores = [score for piece, score in self.scored_pieces() if len(piece) > 1 and score < 0]
        return any(score != int(score) for score in scores)


def spans_of(proto: bytes, text: str) -> list[tuple[int, Span]]:
    """Return id and characters of the pieces (field 2) in the library's own record of an encoded text.

    A piece has its id in field 2, and its first byte and the byte after its last in 4 and 5, which are absent for 0.
    """
    char_of = {0: 0}
    n_bytes = 0
    for number, character in enumerate(text, start=1):
        n_bytes += len(character.encode("utf-8", "replace"))
        char_of[n_bytes] = number
    found = []
    for number, piece in fields(proto):
        if number == 2 and isinstance(piece, bytes):
            values = dict(fields(piece))
            begin, end = int(values.get(4, 0)), int(values.get(5, 0))
            found.append((int(values.get(2, 0)), (char_of.get(begin, 0), char_of.get(end, len(text)))))
    return found


def is_bpe(proto: bytes) -> bool:
    """Tell whether a model is of byte pairs: 2 in field 3 of what it was trained with (field 2); 1 is unigram."""
    specs = [spec for number, spec in fields(proto, skipped=PIECES) if number == 2 and isinstance(spec, bytes)]
    return any(dict(fields(spec)).get(3) == 2 for spec in specs)


def check_tables(proto: bytes) -> None:
    """Check the tables by which a model replaces characters before (field 3) and after (5) its work.

    Raises: ArtifactError if one is damaged, or makes more than `MAX_GROWTH` characters of one.
    """
    specs = [spec for number, spec in fields(proto, skipped=PIECES) if number in (3, 5) and isinstance(spec, bytes)]
    for spec in specs:
        for number, table in fields(spec):
            longest = longest_text(table) if number == 2 and isinstance(table, bytes) and table else 0
            if longest is None or longest > MAX_GROWTH:
                problem = "is damaged" if longest is None else f"makes {longest} characters of one"
                raise ArtifactError(f"`{MODEL_FILE}` has a table of characters that {problem}", "download it again")


def not_a_model(error: Exception) -> ArtifactError:
    """Return the error for bytes that the library cannot use."""
    return ArtifactError(f"`{MODEL_FILE}` is not a sentencepiece model: {error}", "download it again")


def n_threads(n_texts: int) -> int:
    """Return the number of threads to encode this many texts; one in a worker process."""
    n_cores = 1 if multiprocessing.parent_process() else os.cpu_count() or 1
    return max(1, min(n_texts, n_cores))


def as_json(content: Any) -> bytes:
    """Serialize to JSON deterministically."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
