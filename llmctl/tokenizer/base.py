"""What every tokenizer can do; commands and engines see nothing else of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SpecialToken(NamedTuple):
    """A token that a template writes by its name; some swallow the white space on their left or right."""

    token_id: int
    strips_left: bool = False
    strips_right: bool = False


class Tokenizer(ABC):
    """Text to ids and back.

    Text is literal: no special token is ever parsed out of it, so that what a user writes cannot become control.
    `sha256` identifies the content; two tokenizers with the same one give the same ids.
    """

    vocab_size: int
    sha256: str
    pad_id: int | None
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    mask_id: int | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens."""

    @abstractmethod
    def piece(self, index: int) -> str:
        """Return the piece of an id as the vocabulary writes it."""

    @abstractmethod
    def piece_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes an id stands for; none for a special token."""

    @abstractmethod
    def special_id(self, text: str) -> int | None:
        """Return the id of a special token such as `<mask>`, `[MASK]` or `<|im_end|>`, None if there is none."""

    @abstractmethod
    def special_tokens(self) -> dict[str, SpecialToken]:
        """Return every special token by its name."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return what has to lie beside a model for this tokenizer to be found again."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text, between the begin and end tokens where asked and there are such."""
        ids = self.encode_batch([text])[0]
        head = [self.bos_id] if bos and self.bos_id is not None else []
        tail = [self.eos_id] if eos and self.eos_id is not None else []
        return [*head, *ids, *tail]

    def encode_next(self, text: str, *, after_special: bool) -> list[int]:  # noqa: ARG002 - for those that care
        """Return the ids of a text that goes on after another, without the space some put before a first word.

        Where that space comes back after a special token (`after_special`) is the tokenizer's own affair.
        """
        return self.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ids, so that a stream can hold back an incomplete character."""
        return b"".join(self._bytes[index] for index in ids)

    def token_bytes(self) -> NDArray[np.int32]:
        """Return how many UTF-8 bytes each id stands for, int32 (V,); 0 for special tokens."""
        return np.array([len(data) for data in self._bytes], dtype=np.int32)

    def word_starts(self) -> NDArray[np.bool_]:
        """Return which ids begin a word, bool (V,).

        A word begins with white space, or is a character of a script without spaces.
        """
        return np.array([starts_word(data.decode("utf-8", "replace")) for data in self._bytes], dtype=bool)

    def sentinel_ids(self) -> list[int]:
        """Return the ids of `<extra_id_0>`, `<extra_id_1>`, ... in order."""
        ids: list[int] = []
        while (index := self.special_id(f"<extra_id_{len(ids)}>")) is not None:
            ids.append(index)
        return ids

    @cached_property
    def _bytes(self) -> list[bytes]:
        return [self.piece_bytes(index) for index in range(self.vocab_size)]


def starts_word(text: str) -> bool:
    """Tell whether a piece begins a word."""
    return bool(text) and (text[0].isspace() or "\u2e80" <= text[0] <= "\u9fff" or "\uac00" <= text[0] <= "\ud7a3")


def digest(files: Mapping[str, bytes]) -> str:
    """Return one sha256 of named contents."""
    import hashlib

    total = hashlib.sha256()
    for name, data in sorted(files.items()):
        total.update(f"{name}:{len(data)}:".encode() + data)
    return total.hexdigest()
