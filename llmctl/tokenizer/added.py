"""A tokenizer with tokens that were added to a published vocabulary, as chat models add the ends of their turns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.tokenizer.base import Frame, Span, SpecialToken, Tokenizer, digest, no_spans


class AddedTokens(Tokenizer):
    """A tokenizer, and more tokens behind its vocabulary, or tokens of it at which texts are split.

    entries: id -> `content` and flags, as in `added_tokens_decoder`. Special ones are never parsed in a text; others are
    found in it before the base splits the rest. roles: `eos_token` and so on, where a config names them.
    Raises: ArtifactError for an entry in the place of another token.
    """

    def __init__(self, base: Tokenizer, entries: Mapping[int, Mapping[str, Any]], roles: Mapping[str, Any]) -> None:
        self.base, self.entries, self.roles = base, dict(entries), dict(roles)
        self.names = {index: str(entry["content"]) for index, entry in entries.items()}
        self.ids = {name: index for index, name in self.names.items()}
        within = (index for index in sorted(entries) if index < base.vocab_size)
        inside = next((index for index in within if base.piece(index) != self.names[index]), None)
        if inside is not None:
            raise ArtifactError(
                f"the added token `{self.names[inside][:40]}` has the id {inside} of `{base.piece(inside)[:40]}`",
                "save the tokenizer as `tokenizer.json` with transformers",
            )
        self.vocab_size = max(base.vocab_size, max(entries) + 1)
        self.has_target_vocabulary = base.has_target_vocabulary
        self.sha256 = digest({"base": base.sha256.encode(), "added": repr(sorted(self.names.items())).encode()})
        for role in ("pad", "unk", "bos", "eos", "mask"):
            setattr(self, f"{role}_id", self._role(role))
        plain = [name for index, name in self.names.items() if not entries[index].get("special", True)]
        self.plain = re.compile("|".join(map(re.escape, sorted(plain, key=len, reverse=True)))) if plain else None

    def _role(self, role: str) -> int | None:
        token = self.roles.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        found = self.ids.get(token) if isinstance(token, str) else None
        if found is None and isinstance(token, str):
            found = self.base.special_id(token)
        own: int | None = getattr(self.base, f"{role}_id")
        return own if found is None else found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what it was made of."""
        return AddedTokens, (self.base, self.entries, self.roles)

    @property
    def joins_bytes(self) -> bool:
        """As the base."""
        return self.base.joins_bytes

    @property
    def for_target(self) -> Tokenizer:
        """The tokenizer of targets, with the same tokens added."""
        target = self.base.for_target
        return self if target is self.base else AddedTokens(target, self.entries, self.roles)

    def frame(self, family: str) -> Frame:
        """Return the special tokens around a text, with the roles of the added tokens."""
        if (self.bos_id, self.eos_id) == (self.base.bos_id, self.base.eos_id):
            return self.base.frame(family)
        if not self.base.frame(family).before:
            return Frame((), *super().frame(family)[1:])
        return super().frame(family)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens."""
        if self.plain is None:
            return self.base.encode_batch(texts)
        return [self._around(text, after_special=False, is_next=False) for text in texts]

    def cut(self, text: str, n_characters: int) -> list[str]:
        """Cut a text into parts whose ids, one after the other, are those of the text."""
        return self.base.cut(text, n_characters) if self.plain is None else [text]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of every text, each with the characters that it stands for.

        Raises: UsageError for a text that is split at an added token.
        """
        if self.plain is not None and any(self.plain.search(text) for text in texts):
            raise no_spans()
        return self.base.encode_with_spans(texts)

    def encode_next(self, text: str, *, after_special: bool) -> list[int]:
        """Return the ids of a text that continues another."""
        return self._around(text, after_special=after_special, is_next=True)

    def _around(self, text: str, *, after_special: bool, is_next: bool) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self.plain.finditer(text) if self.plain else ():
            ids += self._part(
                text[position : match.start()], after_special=after_special, is_next=is_next or position > 0
            )
            ids.append(self.ids[match[0]])
            position, after_special, is_next = match.end(), True, True
        return ids + self._part(text[position:], after_special=after_special, is_next=is_next)

    def _part(self, text: str, *, after_special: bool, is_next: bool) -> list[int]:
        if not text:
            return []
        return self.base.encode_next(text, after_special=after_special) if is_next else self.base.encode(text)

    def piece(self, index: int) -> str:
        """Return the piece of an id as written in the vocabulary."""
        return self.names.get(index, "") if index >= self.base.vocab_size else self.base.piece(index)

    def piece_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes of an id, empty for a special token."""
        if index < self.base.vocab_size:
            return self.base.piece_bytes(index)
        return b"" if index not in self.names or self._is_special(index) else self.names[index].encode()

    def _is_special(self, index: int) -> bool:
        return bool(self.entries[index].get("special", True))

    def special_id(self, text: str) -> int | None:
        """Return the id of a special token, None if it does not exist."""
        return self._added.get(text, self.base.special_id(text))

    @cached_property
    def _added(self) -> dict[str, int]:
        return {name: index for index, name in self.names.items() if self._is_special(index)}

    def special_tokens(self) -> dict[str, SpecialToken]:
        """Return all special tokens by name."""
        own = {
            name: SpecialToken(i, bool(self.entries[i].get("lstrip")), bool(self.entries[i].get("rstrip")))
            for name, i in self._added.items()
        }
        return {**self.base.special_tokens(), **own}

    def files(self) -> dict[str, bytes]:
        """Return the files of the base, among which are those that list the added tokens."""
        return self.base.files()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are omitted."""
        text = self.decode_bytes(known := list(ids)).decode("utf-8", "replace")
        first = next((index for index in known if self.piece_bytes(index)), -1)
        # The base drops the dummy space before the first word.
        drops = 0 <= first < self.base.vocab_size and not self.base.decode([first]).startswith(" ")
        return text.removeprefix(" ") if drops else text
