"""The tokenizer interface that all other packages use."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmctl.errors import UsageError


class SpecialToken(NamedTuple):
    """A token that templates write by name; some strip the white space to their left or right."""

    token_id: int
    strips_left: bool = False
    strips_right: bool = False


Span = tuple[int, int]
"""The characters of a text that a token stands for: from the first number to before the second."""


class Frame(NamedTuple):
    """The special tokens around a text: before it, between the two texts of a pair, and at the end."""

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Tokenizer(ABC):
    """Converts text to ids and back.

    Text is literal: special tokens are never parsed in it, so user input cannot inject control tokens. `sha256`
    identifies the content: tokenizers with the same digest give the same ids.
    """

    vocab_size: int
    has_target_vocabulary = False
    """Whether the ids of targets are those of another vocabulary."""
    sha256: str
    pad_id: int | None
    unk_id: int | None
    bos_id: int | None
    eos_id: int | None
    mask_id: int | None

    @property
    def joins_bytes(self) -> bool:
        """Whether the text of ids is that of their bytes, one after the other."""
        return True

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens."""

    def cut(self, text: str, n_characters: int) -> list[str]:  # noqa: ARG002 - for subclasses
        """Cut a text into parts of about this size whose ids, one after the other, are those of the text.

        A tokenizer for which this is not known returns the text.
        """
        return [text]

    @abstractmethod
    def piece(self, index: int) -> str:
        """Return the piece of an id as written in the vocabulary."""

    @abstractmethod
    def piece_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes of an id, empty for a special token."""

    @abstractmethod
    def special_id(self, text: str) -> int | None:
        """Return the id of a special token such as `<mask>`, `[MASK]` or `<|im_end|>`, None if it does not exist."""

    @abstractmethod
    def special_tokens(self) -> dict[str, SpecialToken]:
        """Return all special tokens by name."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return the files to store with a model, from which this tokenizer can be loaded again."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are omitted, invalid UTF-8 becomes U+FFFD."""

    def frame(self, family: str) -> Frame:
        """Return the special tokens around the texts of a model of this family.

        As our own models are trained: a decoder's texts begin with BOS, an encoder's also end with EOS, and the sources
        of an encoder-decoder only end with it.
        """
        bos = () if self.bos_id is None else (self.bos_id,)
        eos = () if self.eos_id is None else (self.eos_id,)
        if family == "decoder":
            return Frame(bos)
        return Frame(bos if family == "encoder" else (), eos, eos)

    @property
    def for_target(self) -> "Tokenizer":
        """The tokenizer of an encoder-decoder's targets, where another model or language encodes them."""
        return self

    def for_output(self, family: str) -> "Tokenizer":
        """Return the tokenizer of what a model of a family writes: an encoder-decoder's targets."""
        return self.for_target if family == "encoder_decoder" else self

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text, optionally with BOS and EOS tokens if the tokenizer has them."""
        ids = self.encode_batch([text])[0]
        head = [self.bos_id] if bos and self.bos_id is not None else []
        tail = [self.eos_id] if eos and self.eos_id is not None else []
        return [*head, *ids, *tail]

    def encode_with_spans(
        self,
        texts: Sequence[str],  # noqa: ARG002 - for subclasses
    ) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of every text as `encode_batch` does, each with the characters that it stands for.

        Raises: UsageError for a tokenizer that does not tell.
        """
        raise no_spans()

    def encode_next(self, text: str, *, after_special: bool) -> list[int]:  # noqa: ARG002 - for subclasses
        """Return the ids of a text that continues another, without the dummy space before its first word.

        after_special: the previous token is a special one; some tokenizers then do add the space.
        """
        return self.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ids, from which a stream can hold back an incomplete character."""
        # Kept one by one: all pieces of a vocabulary take a tenth of a second.
        known, ids = self._bytes_of, list(ids)
        for index in ids:
            if index not in known:
                known[index] = self.piece_bytes(index)
        return b"".join(known[index] for index in ids)

    def token_bytes(self) -> NDArray[np.int32]:
        """Return the number of UTF-8 bytes of each id, int32 (V,); 0 for special tokens."""
        return np.array([len(data) for data in self._bytes], dtype=np.int32)

    def word_starts(self) -> NDArray[np.bool_]:
        """Return which ids start a word, bool (V,).

        A word starts with white space, or is a character of a script without spaces.
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

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return {}


def no_spans() -> UsageError:
    """Return the error for a tokenizer that does not tell where in a text its tokens are."""
    return UsageError(
        "this tokenizer does not tell where in a text its tokens are",
        "save it as `tokenizer.json` with transformers: AutoTokenizer.from_pretrained(X).save_pretrained(X)",
    )


def starts_word(text: str) -> bool:
    """Tell whether a piece starts with white space, a CJK character or a Hangul syllable."""
    return bool(text) and (text[0].isspace() or "\u2e80" <= text[0] <= "\u9fff" or "\uac00" <= text[0] <= "\ud7a3")


def digest(files: Mapping[str, bytes]) -> str:
    """Return one sha256 over named files."""
    import hashlib

    total = hashlib.sha256()
    for name, data in sorted(files.items()):
        total.update(f"{name}:{len(data)}:".encode() + data)
    return total.hexdigest()
