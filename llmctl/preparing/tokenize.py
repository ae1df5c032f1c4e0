"""Train a tokenizer, encode a corpus into shards, and convert lines to ids and back.

Does not import torch.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.config import DataConfig, TokenizerConfig
from llmctl.data.builtin import builtin_documents, builtin_provenance
from llmctl.data.shard_writer import write_shards
from llmctl.data.shards import Part, ShardSet, is_begun
from llmctl.data.sources import read_documents, source_sha256
from llmctl.data.text_files import Blank
from llmctl.errors import OutputError, UsageError
from llmctl.files import atomic_path, ensure_writable, write_bytes
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import load_tokenizer
from llmctl.tokenizer.train import train_tokenizer

BATCH_LINES = 256


def train(paths: Sequence[str], config: TokenizerConfig, data: DataConfig, out: Path, *, force: bool) -> Tokenizer:
    """Train a tokenizer on a corpus and write it into a folder atomically.

    Raises: OutputError if the folder exists and `force` is not set; UsageError as the trainer.
    """
    if out.exists() and not force:
        raise OutputError(f"`{out}` already exists", "`-f` replaces it, `-o` writes elsewhere")
    if out.exists() and not out.is_dir():
        raise OutputError(f"`{out}` is a file, but a tokenizer is a folder", "use `-o` with a folder")
    ensure_writable(out if out.is_dir() else out.parent)
    texts: Iterable[str] = (
        read_documents(paths, text_key=data.text_key, split=data.split) if paths else builtin_documents()
    )
    tokenizer = train_tokenizer(texts, config)
    write_tokenizer(out, tokenizer)
    return tokenizer


def write_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer: a new folder atomically, an existing one file by file, keeping its other files."""
    if out.exists():
        for name, content in tokenizer.files().items():
            write_bytes(out / name, content)
        return
    with atomic_path(out) as folder:
        for name, content in tokenizer.files().items():
            write_bytes(folder / name, content)


def encode_corpus(
    paths: Sequence[str],
    tokenizer_path: str,
    data: DataConfig,
    out: Path,
    *,
    part: Part,
    workers: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> ShardSet | None:
    """Encode a corpus into shards, each document between begin and end tokens; resumes an interrupted call.

    workers: processes, 0 for one per core. Returns None while other parts of the corpus are missing.
    Raises: ArtifactError if the folder contains another corpus or tokenizer; OutputError if it contains shards and the
    text comes from a pipe, which cannot be compared with their source.
    """
    tokenizer, blank = load_tokenizer(tokenizer_path), Blank()
    if paths:
        documents: Iterable[str] = read_documents(paths, text_key=data.text_key, split=data.split, blank=blank)
        identity = source_sha256(paths)
    else:
        documents, identity = builtin_documents(), str(builtin_provenance()["sha256"])
    if not identity and is_begun(out, part):
        raise OutputError(
            f"`{out}` already contains shards, and text from a pipe cannot be compared with their source",
            "use a new folder with `-o`, or encode a file",
        )
    shards = write_shards(
        out,
        documents,
        tokenizer.encode_batch,
        cut=tokenizer.cut,
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        identity={
            "tokenizer_sha256": tokenizer.sha256,
            "source_sha256": identity,
            "split": data.split,
            "text_key": data.text_key,
        },
        workers=workers or n_cores(),
        part=part,
        say=say,
    )
    for line in blank.lines("documents"):
        say(line)
    write_tokenizer(out, tokenizer)
    return shards


def batched(lines: Iterable[str], size: int = BATCH_LINES) -> Iterator[list[str]]:
    """Group lines into batches; the first are small, so that output starts early."""
    batch: list[str] = []
    limit = 1
    for line in lines:
        batch.append(line)
        if len(batch) >= limit:
            yield batch
            batch, limit = [], min(size, limit * 2)
    if batch:
        yield batch


def encode_lines(tokenizer: Tokenizer, lines: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ids of every line."""
    for batch in batched(lines):
        yield from tokenizer.encode_batch(batch)


def decode_lines(tokenizer: Tokenizer, lines: Iterable[str]) -> Iterator[str]:
    """Yield the text of every line of ids.

    Raises: UsageError naming the line and the word that is not an id of the vocabulary.
    """
    for number, line in enumerate(lines, start=1):
        ids = []
        for word in line.split():
            if not is_number(word) or int(word) >= tokenizer.vocab_size:
                raise UsageError(
                    f"line {number} has `{word[:40]}`, which is not an id from 0 to {tokenizer.vocab_size - 1}",
                    "`--decode` reads numbers separated by spaces",
                )
            ids.append(int(word))
        yield tokenizer.decode(ids)


def is_number(word: str) -> bool:
    """Return whether a word is a decimal id; `int` raises for thousands of digits."""
    return len(word) < 20 and word.isascii() and word.isdigit()


def n_cores() -> int:
    """Return how many cores this process may use, which a scheduler may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Statistics:
    """Statistics of a tokenizer on a text."""

    n_lines: int
    n_bytes: int
    n_words: int
    n_tokens: int
    n_unknown: int
    n_byte_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return counts and rates; fertility is tokens per word (a Chinese character counts as one)."""
        tokens = max(self.n_tokens, 1)
        return {
            "lines": self.n_lines,
            "bytes": self.n_bytes,
            "words": self.n_words,
            "tokens": self.n_tokens,
            "bytes_per_token": round(self.n_bytes / tokens, 4),
            "fertility": round(self.n_tokens / max(self.n_words, 1), 4),
            "unknown_rate": round(self.n_unknown / tokens, 6),
            "byte_rate": round(self.n_byte_tokens / tokens, 6),
        }


WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7a3]|[^\W\u2e80-\u9fff\uac00-\ud7a3]+|[^\w\s]")


def measure(tokenizer: Tokenizer, lines: Iterable[str]) -> Statistics:
    """Count the tokens of a text, and those that are unknown or byte fallbacks."""
    is_byte = np.array(
        [bool(re.fullmatch(r"<0x[0-9A-F]{2}>", tokenizer.piece(i))) for i in range(tokenizer.vocab_size)]
    )
    newline = [index for index in np.flatnonzero(is_byte) if tokenizer.piece_bytes(int(index)) == b"\n"]
    is_byte[newline] = False  # a line end is a single byte anyway, so its byte token is not a fallback
    totals = np.zeros(6, dtype=np.int64)
    for batch in batched(lines):
        for line, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            array = np.array(ids, dtype=np.int64)
            unknown = 0 if tokenizer.unk_id is None else int((array == tokenizer.unk_id).sum())
            n_words = len(WORD.findall(line))
            totals += [1, len(line.encode()), n_words, len(ids), unknown, int(is_byte[array].sum()) if len(ids) else 0]
    return Statistics(*totals.tolist())
