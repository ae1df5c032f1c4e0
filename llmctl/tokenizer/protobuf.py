"""Read and write protocol buffers field by field: sentencepiece models, whose library does not show their settings."""

from collections.abc import Iterator

from llmctl.errors import ArtifactError


def fields(message: bytes, *, skipped: int = 0) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of the fields of a message: an integer, or bytes.

    skipped: number below 16 of a field of bytes that is stepped over, as the quarter of a million pieces of a large model.
    Raises: ArtifactError for what is no protocol buffer.
    """
    at, end, skipped_key = 0, len(message), skipped << 3 | 2
    while at < end:
        if skipped and message[at] == skipped_key and at + 1 < end and message[at + 1] < 0x80:
            at += 2 + message[at + 1]
            continue
        key, at = varint(message, at)
        kind, number = key & 7, key >> 3
        if kind == 0:
            value, at = varint(message, at)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise damaged(f"field {number} is of the unknown kind {kind}")
        size, at = varint(message, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if at + size > end:
            raise damaged(f"field {number} ends behind byte {end}")
        if number != skipped:
            yield number, message[at : at + size]
        at += size


def varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a variable-length integer and the position after it.

    Raises: ArtifactError if it does not end within ten bytes.
    """
    value = 0
    for shift, byte in zip(range(0, 70, 7), message[at : at + 10], strict=False):
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise damaged(f"the integer before byte {at} does not end")


def bytes_field(number: int, value: bytes) -> bytes:
    """Return a field of bytes, as it is written."""
    return encoded(number << 3 | 2) + encoded(len(value)) + value


def varint_field(number: int, value: int) -> bytes:
    """Return a field of an integer, as it is written."""
    return encoded(number << 3) + encoded(value)


def encoded(value: int) -> bytes:
    """Return an integer of variable length."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def damaged(what: str) -> ArtifactError:
    """Return the error for bytes that are no sentencepiece model."""
    return ArtifactError(f"`tokenizer.model` is not a sentencepiece model: {what}", "download it again")
