"""Tokenizer and other small files in the header of a model file: as base64, or compressed where the file is to be small."""

import json
import zlib
from base64 import b64decode, b64encode, b85decode, b85encode
from collections.abc import Mapping

from llmctl.files import parse_json

PLAIN, COMPRESSED = "llmctl.files", "llmctl.files.zlib"
"""Metadata keys: JSON objects of file name -> base64, and -> base85 of zlib's format."""

LIMIT_BYTES = 64_000_000
"""No tokenizer is larger than this."""


def file_metadata(files: Mapping[str, bytes], *, compressed: bool) -> dict[str, str]:
    """Return the metadata entry that contains files."""
    if not compressed:
        texts = {name: b64encode(data).decode() for name, data in files.items()}
        return {PLAIN: json.dumps(texts, sort_keys=True)}
    texts = {name: b85encode(zlib.compress(data, 9)).decode() for name, data in files.items()}
    return {COMPRESSED: json.dumps(texts, sort_keys=True)}


def files_in_metadata(metadata: Mapping[str, str]) -> dict[str, bytes] | None:
    """Return the files that a header contains; None if it has no such entry. Their names are not checked.

    Raises: ValueError or TypeError for an entry that is damaged, or a file larger than `LIMIT_BYTES`.
    """
    key = next((key for key in (COMPRESSED, PLAIN) if key in metadata), None)
    if key is None:
        return None
    texts = parse_json(metadata[key])
    if not isinstance(texts, dict):
        raise TypeError(f"{key} is not a JSON object")
    decode = inflated if key == COMPRESSED else b64
    return {name: decode(name, text) for name, text in texts.items()}


def b64(name: str, text: str) -> bytes:
    """Decode base64."""
    try:
        return b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name[:80]}` is not valid base64") from error


def inflated(name: str, text: str) -> bytes:
    """Decode and decompress a file; nothing larger than `LIMIT_BYTES` is decompressed."""
    try:
        engine = zlib.decompressobj()
        data = engine.decompress(b85decode(text), LIMIT_BYTES)
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"`{name[:80]}` is not valid base85 of compressed data") from error
    if not engine.eof:
        raise ValueError(f"`{name[:80]}` is truncated, or larger than {LIMIT_BYTES:,} bytes")
    return data
