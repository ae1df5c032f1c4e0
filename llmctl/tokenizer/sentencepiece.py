"""Tokenizers of the sentencepiece kind: ours, and the `.model` files that published models bring."""

import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.tokenizer.base import SpecialToken, Tokenizer, digest
from llmctl.tokenizer.export import tokenizer_config, tokenizer_json

SPACE = "\u2581"
"""sentencepiece writes a space as U+2581; a U+2581 in a user's text would come back as a space."""

MODEL_FILE = "tokenizer.model"

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec { add_dummy_prefix: false }` (field 3 of field 3); what comes last in a protocol buffer holds."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    With byte fallback, a U+2581 in the text is encoded as its three bytes, and `decode(encode(x)) == x` holds for
    every string if the model normalizes nothing and adds no dummy prefix (ours does neither).
    Raises: ArtifactError at construction if the bytes are not a sentencepiece model.
    """

    def __init__(self, proto: bytes, extra_files: dict[str, bytes] | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        if not proto:  # the library takes it for a model that comes later, and says so on stderr
            raise ArtifactError(f"`{MODEL_FILE}` is empty", "fetch it again")
        try:
            self._processor = SentencePieceProcessor(model_proto=proto)
            self.vocab_size = self._processor.get_piece_size()
        except (RuntimeError, ValueError, OSError) as error:
            raise ArtifactError(f"`{MODEL_FILE}` is not a sentencepiece model: {error}", "fetch it again") from None
        if self.vocab_size == 0:
            raise ArtifactError(f"`{MODEL_FILE}` is not a sentencepiece model: it has no pieces", "fetch it again")
        self._proto = proto
        self._extra = extra_files or {}
        self.sha256 = digest({MODEL_FILE: proto})
        processor = self._processor
        ids = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = (index if index >= 0 else None for index in ids)
        self.mask_id = self.special_id("<mask>")
        self._space_bytes = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._has_bytes = all(processor.is_byte(index) for index in self._space_bytes)
        first = processor.encode("a")
        self._prefix = bool(first) and self.piece(first[0]).startswith(SPACE)
        probe = "  a\tb \n"
        self.is_lossless = self._has_bytes and not self._prefix and processor.decode(processor.encode(probe)) == probe

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a worker process make its own copy out of the files."""
        return SentencePieceTokenizer, (self._proto, self._extra)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens."""
        batch = [text if isinstance(text, str) else str(text) for text in texts]
        processor = self._processor
        # Of one text nothing is shared out: starting a thread costs more than a line.
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

    def _encode_around_spaces(self, text: str) -> list[int]:
        out: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            out += self._space_bytes if number else []
            out += self._processor.encode(part)
        return out

    def encode_next(self, text: str, *, after_special: bool) -> list[int]:
        """Return the ids of a text that goes on after another, without the space before a first word.

        After a special token it comes back if `tokenizer_config.json` says `legacy`, as in transformers.
        """
        if not self._prefix:
            return self.encode(text)
        begins = after_special and self._is_legacy and not text.startswith(" ")
        ids: list[int] = self._inner.encode(f" {text}" if begins else text)
        return ids

    @cached_property
    def _inner(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._proto + NO_DUMMY_PREFIX)

    @cached_property
    def _is_legacy(self) -> bool:
        try:
            config = json.loads(self._extra.get("tokenizer_config.json", b"{}"))
        except ValueError:
            return False
        return isinstance(config, dict) and config.get("legacy") is True

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._prefix else text

    def piece(self, index: int) -> str:
        """Return the piece of an id as the vocabulary writes it."""
        piece: str = self._processor.id_to_piece(index)
        return piece

    def piece_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes an id stands for; none for a special token."""
        processor, piece = self._processor, self.piece(index)
        if processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if processor.is_control(index):
            return b""
        if processor.is_unknown(index):
            return b"" if self._has_bytes else "\u2047".encode()
        return piece.replace(SPACE, " ").encode()

    def special_id(self, text: str) -> int | None:
        """Return the id of a control piece, None if there is none of this name."""
        index = int(self._processor.piece_to_id(text))
        known = self._processor.id_to_piece(index) == text
        special = self._processor.is_control(index) or self._processor.is_unknown(index)
        return index if known and special else None

    def specials(self) -> dict[str, int]:
        """Return every special piece with its id."""
        pieces = {self.piece(index): index for index in range(min(self.vocab_size, 4096))}
        return {piece: index for piece, index in pieces.items() if self.special_id(piece) is not None}

    def special_tokens(self) -> dict[str, SpecialToken]:
        """Return every control piece, and the one for what is unknown, by its name."""
        return dict(self._controls)

    @cached_property
    def _controls(self) -> dict[str, SpecialToken]:
        processor = self._processor
        ids = [i for i in range(self.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
        return {self.piece(index): SpecialToken(index) for index in ids}

    def scored_pieces(self) -> list[tuple[str, float]]:
        """Return all pieces with their scores, in the order of their ids."""
        return [(self.piece(index), float(self._processor.get_score(index))) for index in range(self.vocab_size)]

    def files(self) -> dict[str, bytes]:
        """Return the model, and for our own also what Hugging Face's tokenizers read."""
        files = {MODEL_FILE: self._proto, **self._extra}
        if self.is_lossless and "tokenizer.json" not in files:
            files["tokenizer.json"] = as_json(tokenizer_json(self.scored_pieces(), self.specials(), self._is_unigram()))
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

    def _is_unigram(self) -> bool:
        # A BPE model's scores are minus the rank of the merge, a unigram's are log-probabilities.
        scores = [score for piece, score in self.scored_pieces() if len(piece) > 1 and score < 0]
        return any(score != int(score) for score in scores)


def n_threads(n_texts: int) -> int:
    """Return how many threads encode so many texts; a worker process has its core and no more."""
    n_cores = 1 if multiprocessing.parent_process() else os.cpu_count() or 1
    return max(1, min(n_texts, n_cores))


def as_json(content: Any) -> bytes:
    """Return JSON bytes that are the same every time."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
