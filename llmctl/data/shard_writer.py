"""Encode documents in parallel and write them as token shards, resumably."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmctl.data.shards import SHARD_TOKENS, TYPE_CODES, VERSION, WHOLE, Part, ShardSet, read_manifest
from llmctl.errors import ArtifactError, MemoryLimitError
from llmctl.files import write_bytes, writing

if TYPE_CHECKING:
    from concurrent.futures import Future

BATCH_CHARACTERS = 1 << 19
"""The amount of text sent to a worker at a time."""

PART_CHARACTERS = 1 << 18
"""Documents are cut into parts of this size, so that several workers share a large one."""

EncodeBatch = Callable[[list[str]], list[list[int]]]

Ids = tuple["array[int]", list[int]]
"""The ids of several texts as a worker sends them, and how many each has: lists of numbers take longer to send."""

Cut = Callable[[str, int], list[str]]
"""Cuts a text into parts of about so many characters, whose ids, one after the other, are those of the text."""


_encode: EncodeBatch | None = None  # set in each worker process by its initializer


def write_shards(
    folder: str | Path,
    documents: Iterable[str],
    encode_batch: EncodeBatch,
    *,
    bos: int | None,
    eos: int | None,
    vocab_size: int,
    identity: Mapping[str, Any],
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    cut: Cut = lambda text, _: [text],
    part: Part = WHOLE,
    say: Callable[[str], None] = lambda _: None,
) -> ShardSet | None:
    """Encode documents into shards, resuming after finished shards, and open the folder.

    Each document gets `bos` and `eos` if given. With `part`, only every count-th document is encoded, and None is
    returned while other parts are missing. Memory is bounded by one shard plus the batches in flight.
    Raises: ArtifactError if the folder was started with another identity; OutputError if it cannot be written;
    MemoryLimitError if a worker process was killed.
    """
    folder = Path(folder)
    identity = {**identity, "vocab_size": vocab_size, "bos": bos, "eos": eos, "part_count": part.count}
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    finished = resume_state(folder, part, identity)
    own = (text for number, text in enumerate(documents) if number % part.count == part.index)
    # Shards end at document boundaries, so the number of finished documents is the resume position.
    remaining = islice(own, sum(shard["n_documents"] for shard in finished), None)
    writer = _Writer(folder, part, dtype, identity, finished, shard_tokens)
    for ids in encode_all(remaining, encode_batch, workers, cut):
        writer.add(ids, bos, eos)
    writer.finish()
    say(f"{writer.n_documents:,} documents, {writer.n_tokens:,} tokens in {folder}")
    if part.count > 1 and len(list(folder.glob("part-*-of-*.json"))) < part.count:
        return None
    return ShardSet.open(folder)


class RowWriter:
    """Writes rows of ids one at a time, such as to two folders in parallel.

    The folder is unreadable until `finish`; it does not resume: an earlier attempt is deleted.
    """

    def __init__(self, folder: Path, vocab_size: int, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        full = {**identity, "vocab_size": vocab_size, "bos": None, "eos": None, "part_count": 1}
        self.writer = _Writer(folder, WHOLE, "<u2" if vocab_size <= 1 << 16 else "<u4", full, [], SHARD_TOKENS)

    def add(self, ids: Sequence[int]) -> None:
        """Append a row."""
        self.writer.add(ids)

    def finish(self) -> ShardSet:
        """Write the last shard and the manifest, and open the folder."""
        self.writer.finish()
        return ShardSet.open(self.folder)


def resume_state(folder: Path, part: Part, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the finished shards of this part.

    Raises: ArtifactError if they were made with another tokenizer, source or number of parts.
    """
    state = folder / f".{part.stem}.progress.json"
    final = folder / f"{part.stem}.json"
    for path in (final, state):  # `final` if this part is complete, `state` if it was interrupted
        if path.exists():
            known = read_manifest(path)
            differing = [key for key, value in identity.items() if known.get(key) != value]
            if differing:
                raise other_identity(folder, differing[0], known, identity)
            return list(known["shards"])
    # Without own shards, the folder may still contain another part, of this corpus or a different one.
    for path in sorted(folder.glob("part-*-of-*.json"))[:1]:
        known = read_manifest(path)
        differing = [key for key, value in identity.items() if known.get(key) != value]
        if "part_count" in differing:
            raise ArtifactError(
                f"`{folder}` contains a corpus in {known.get('part_count')} parts, not {part.count}",
                "choose a new folder with -o",
            )
        if differing:
            raise other_identity(folder, differing[0], known, identity)
    return []


def other_identity(folder: Path, key: str, known: Mapping[str, Any], identity: Mapping[str, Any]) -> ArtifactError:
    """Return the error for a folder that was encoded with another tokenizer, source or setting."""
    return ArtifactError(
        f"`{folder}` was encoded with `{key}` {known.get(key)!r:.80}, not {identity[key]!r:.80}",
        "choose a new folder with -o",
    )


class _Writer:
    """Collects tokens; writes each full shard, and the manifest at the end."""

    def __init__(
        self,
        folder: Path,
        part: Part,
        dtype: str,
        identity: Mapping[str, Any],
        shards: list[dict[str, Any]],
        shard_tokens: int,
    ) -> None:
        self.folder, self.part, self.dtype, self.identity = folder, part, dtype, identity
        self.shards, self.shard_tokens = shards, shard_tokens
        self.clear()

    def clear(self) -> None:
        # Packed as on disk: a list of arrays would cost about a hundred bytes per document.
        self.tokens = array(TYPE_CODES[self.dtype])
        self.lengths = array("q")

    @property
    def n_documents(self) -> int:
        return sum(int(shard["n_documents"]) for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        return sum(int(shard["n_tokens"]) for shard in self.shards)

    def add(self, ids: "Sequence[int] | array[int]", bos: int | None = None, eos: int | None = None) -> None:
        if bos is not None:
            self.tokens.append(bos)
        if isinstance(ids, array) and ids.typecode != self.tokens.typecode:
            wide = np.asarray(ids)
            if wide.max(initial=0) > 0xFFFF:
                raise OverflowError("an id does not fit")
            self.tokens.frombytes(wide.astype(np.uint16).tobytes())
        else:
            self.tokens.extend(ids)
        if eos is not None:
            self.tokens.append(eos)
        self.lengths.append(len(ids) + (bos is not None) + (eos is not None))
        if len(self.tokens) >= self.shard_tokens:
            self.publish()

    def publish(self) -> None:
        """Write the collected shard, then the progress file that lists it: in this order a crash loses only a shard."""
        stem = f"{self.part.stem}-{len(self.shards):05d}"
        tokens = np.asarray(self.tokens).astype(self.dtype, copy=False).tobytes()
        self.shards.append(
            {
                "tokens": f"{stem}.tokens.bin",
                "lengths": f"{stem}.lengths.bin",
                "n_documents": len(self.lengths),
                "n_tokens": len(self.tokens),
                "sha256": hashlib.sha256(tokens).hexdigest(),
            }
        )
        write_bytes(self.folder / f"{stem}.tokens.bin", tokens)
        write_bytes(self.folder / f"{stem}.lengths.bin", np.asarray(self.lengths, dtype="<i8").tobytes())
        self.write(f".{self.part.stem}.progress.json")
        self.clear()

    def finish(self) -> None:
        if self.lengths:
            self.publish()
        self.write(f"{self.part.stem}.json")
        (self.folder / f".{self.part.stem}.progress.json").unlink(missing_ok=True)

    def write(self, name: str) -> None:
        manifest = {
            "version": VERSION,
            "part_index": self.part.index,
            **self.identity,
            "dtype": self.dtype,
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "shards": self.shards,
        }
        write_bytes(self.folder / name, (json.dumps(manifest, indent=1) + "\n").encode())


def encode_all(
    documents: Iterable[str], encode_batch: EncodeBatch, workers: int, cut: Cut = lambda text, _: [text]
) -> Iterator["list[int] | array[int]"]:
    """Yield the ids of every document in order, encoded in batches by `workers` processes.

    A single batch is encoded in this process. At most two batches per worker are in flight.
    Raises: MemoryLimitError if a worker was killed: most likely by the system's out-of-memory killer.
    """
    before: Any = None
    for ids, is_last in encode_parts(parts_of(documents, cut if workers > 1 else None), encode_batch, workers):
        if before is None:
            before = ids
        else:
            before.extend(ids)
        if is_last:
            yield before
            before = None


def parts_of(documents: Iterable[str], cut: Cut | None) -> Iterator[tuple[str, bool]]:
    """Yield the parts of every document, and whether a part is its last."""
    for text in documents:
        *parts, last = cut(text, PART_CHARACTERS) if cut and len(text) > 2 * PART_CHARACTERS else [text]
        yield from ((part, False) for part in parts)
        yield last, True


def encode_parts(
    parts: Iterable[tuple[str, bool]], encode_batch: EncodeBatch, workers: int
) -> Iterator[tuple["list[int] | array[int]", bool]]:
    """Yield the ids of every part in order, each with its mark."""
    batches = batched_by_size(parts)
    first = list(islice(batches, 2))
    if workers <= 1 or len(first) < 2:
        for texts, marks in chain(first, batches):
            yield from zip(encode_batch(texts), marks, strict=True)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Spawned, not forked: forking a process that has used torch or threads can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encode_batch,))
    pending: deque[tuple[Future[Ids], list[bool]]] = deque()
    try:
        for texts, marks in chain(first, batches):
            pending.append((pool.submit(_work, texts), marks))
            if len(pending) >= 2 * workers:
                yield from _marked(*pending.popleft())
        while pending:
            yield from _marked(*pending.popleft())
    except BrokenProcessPool:
        raise MemoryLimitError(
            f"one of {workers} processes that encode text was killed, probably for lack of memory",
            "run the same command with fewer --workers; it resumes",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _marked(future: "Future[Ids]", marks: list[bool]) -> Iterator[tuple["array[int]", bool]]:
    ids, lengths = future.result()
    start = 0
    for length, mark in zip(lengths, marks, strict=True):
        yield ids[start : start + length], mark
        start += length


def _start_worker(encode_batch: EncodeBatch) -> None:
    global _encode  # noqa: PLW0603 - pickled once per worker process, not per batch
    _encode = encode_batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; only the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent process ends, even if it was killed, so that no orphans remain."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(batch: list[str]) -> Ids:
    assert _encode is not None
    ids, lengths = array("I"), []
    for part in _encode(batch):
        ids.extend(part)
        lengths.append(len(part))
    return ids, lengths


def batched_by_size(parts: Iterable[tuple[str, bool]]) -> Iterator[tuple[list[str], list[bool]]]:
    """Group texts and their marks into batches of about BATCH_CHARACTERS."""
    texts: list[str] = []
    marks: list[bool] = []
    size = 0
    for text, mark in parts:
        texts.append(text)
        marks.append(mark)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield texts, marks
            texts, marks, size = [], [], 0
    if texts:
        yield texts, marks
