"""The pieces of a vocabulary by their bytes, and the pieces that some bytes consist of inside a text."""

from collections.abc import Mapping

from llmctl.tokenizer.base import Tokenizer


def by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the id of each piece by its bytes, the first of several."""
    found: dict[bytes, int] = {}
    for index in range(tokenizer.vocab_size):
        if data := tokenizer.piece_bytes(index):
            found.setdefault(data, index)
    return found


def longest_prefix(data: bytes, pieces: Mapping[bytes, int]) -> int | None:
    """Return the id of the longest piece that some bytes begin with."""
    return next((pieces[data[:end]] for end in range(len(data), 0, -1) if data[:end] in pieces), None)


def pieces_of(data: bytes, tokenizer: Tokenizer, known: Mapping[bytes, int]) -> tuple[int, ...]:
    """Return the ids of some bytes inside a text, as far as there are pieces for them; they may end in a character.

    known: see `by_bytes`.
    """
    if data in known:
        return (known[data],)
    try:
        found = tokenizer.encode_next(data.decode(), after_special=False)
    except UnicodeDecodeError:
        found = []
    if found and b"".join(tokenizer.piece_bytes(one) for one in found) == data:
        return tuple(found)
    parts: list[int] = []
    while data and (piece := longest_prefix(data, known)) is not None:
        parts.append(piece)
        data = data[len(tokenizer.piece_bytes(piece)) :]
    return tuple(parts)
