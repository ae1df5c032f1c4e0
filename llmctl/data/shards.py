"""Token shards on disk: memory-mapped, resumable, split over processes and hosts; merging them is only listing.

A folder holds, per part i of n, shard files of raw little-endian token ids, the length of every document, and a
manifest that names them. A finished shard is never made again. Knows no tokenizer: the encode function is passed in.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.errors import ArtifactError, MemoryLimitError, NotFoundError, UsageError
from llmctl.files import write_bytes, writing

VERSION = 1
SHARD_TOKENS = 1 << 25
BATCH_CHARACTERS = 1 << 20
"""Text handed to a worker at a time."""

PER_PART = {"part_index", "n_documents", "n_tokens", "shards"}
"""What the manifests of two parts of one corpus may differ in."""

Ints = NDArray[np.int64]
TYPE_CODES = {"<u2": "H", "<u4": "I"}
"""How the types of ids on disk are called by `array`."""

EncodeBatch = Callable[[list[str]], list[list[int]]]
_encode: EncodeBatch | None = None  # a worker process's own copy, set by its initialiser


@dataclass(frozen=True)
class Part:
    """Part `index` (from 0) of `count` parts of a corpus."""

    index: int = 0
    count: int = 1

    @property
    def stem(self) -> str:
        """The beginning of this part's file names."""
        return f"part-{self.index:05d}-of-{self.count:05d}"


def parse_part(text: str) -> Part:
    """Read `i/n`, i from 0 to n - 1.

    Raises: UsageError naming the value.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 0 <= int(match[1]) < int(match[2]):
        raise UsageError(f"`--shard {text}` is not a part", "write i/n with i from 0 to n-1, such as 0/4")
    return Part(int(match[1]), int(match[2]))


class ShardSet:
    """All parts of a shard folder as one sequence of documents."""

    def __init__(self, folder: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.manifest = dict(manifests[0])
        self.vocab_size = int(self.manifest["vocab_size"])
        shards = [shard for manifest in manifests for shard in manifest["shards"]]
        dtype = np.dtype(self.manifest["dtype"])
        self._tokens = [map_array(folder / shard["tokens"], dtype) for shard in shards]
        lengths = [map_array(folder / shard["lengths"], np.dtype("<i8")) for shard in shards]
        self.lengths: Ints = np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        self.n_documents = len(self.lengths)
        self.n_tokens = int(self.lengths.sum())
        self._first_document = np.cumsum([0, *map(len, lengths)])
        offsets = [np.cumsum(each) - each for each in lengths]
        self._offsets: Ints = np.concatenate([*offsets, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        for shard, tokens, each in zip(shards, self._tokens, lengths, strict=True):
            if len(tokens) != int(each.sum()) or len(tokens) != shard["n_tokens"]:
                raise ArtifactError(
                    f"`{folder / shard['tokens']}` has {len(tokens)} tokens, its documents {int(each.sum())}, its "
                    f"manifest says {shard['n_tokens']}",
                    "encode the corpus again into a new folder",
                )

    @classmethod
    def open(cls, folder: str | Path) -> "ShardSet":
        """Open a folder with all its parts.

        Raises: NotFoundError if it holds no shards, ArtifactError if a part is missing, damaged, or of another
        tokenizer or source.
        """
        folder = Path(folder)
        manifests = [read_manifest(path) for path in sorted(folder.glob("part-*.json"))]
        if not manifests:
            raise NotFoundError(f"`{folder}` holds no shards", "llmctl tokenize encode makes them")
        count = int(manifests[0]["part_count"])
        there = {int(manifest["part_index"]) for manifest in manifests}
        missing = sorted(set(range(count)) - there)
        if missing:
            names = ", ".join(f"{index}/{count}" for index in missing[:8])
            raise ArtifactError(f"`{folder}` lacks {len(missing)} of {count} parts: {names}", "run those --shard parts")
        for manifest in manifests:
            for key in sorted((manifest.keys() | manifests[0].keys()) - PER_PART):
                if manifest.get(key) != manifests[0].get(key):
                    raise ArtifactError(
                        f"the parts in `{folder}` differ in `{key}`", "encode them again into a new folder"
                    )
        return cls(folder, manifests)

    def document(self, index: int) -> NDArray[np.integer[Any]]:
        """Return the tokens of a document, mapped from the file."""
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        start = int(self._offsets[index])
        return self._tokens[shard][start : start + int(self.lengths[index])]

    def content_sha256(self) -> str:
        """Return the sha256 of all tokens and where documents end, however they lie in files."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for tokens in self._tokens:
            digest.update(np.ascontiguousarray(tokens).data)
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Ints:
        """Return tokens `start` to `stop` of all documents joined end to end."""
        pieces = []
        at = 0
        for tokens in self._tokens:
            begin, end = max(start - at, 0), min(stop - at, len(tokens))
            if begin < end:
                pieces.append(np.asarray(tokens[begin:end], dtype=np.int64))
            at += len(tokens)
        return np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])


def is_shard_folder(path: Path) -> bool:
    """Tell whether a folder holds encoded shards."""
    return path.is_dir() and any(path.glob("part-*-of-*.json"))


def is_begun(folder: Path, part: Part) -> bool:
    """Tell whether a part has been encoded, whole or up to some shard."""
    return any((folder / name).exists() for name in (f"{part.stem}.json", f".{part.stem}.progress.json"))


def map_array(path: Path, dtype: np.dtype[Any]) -> NDArray[np.integer[Any]]:
    """Map a file of numbers; an empty file is an empty array, which mmap refuses."""
    try:
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"shard `{path}` cannot be read: {error}", "encode the corpus again") from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a part's manifest.

    Raises: ArtifactError if it is not one.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise ArtifactError(f"`{path}` is of version {manifest['version']}, this is version {VERSION}")
        check_manifest(manifest)
        return dict(manifest)
    except KeyError as error:
        reason = f"it has no {error}"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise ArtifactError(f"shard manifest `{path}` is damaged: {reason}", "encode the corpus again into a new folder")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that lacks something, or whose files would lie elsewhere than beside it.

    Raises: KeyError, TypeError or ValueError saying what is wrong.
    """
    for key in ("part_index", "part_count", "vocab_size"):
        int(manifest[key])
    if manifest["dtype"] not in TYPE_CODES:
        raise ValueError(f"dtype is {manifest['dtype']!r}")
    for shard in manifest["shards"]:
        int(shard["n_documents"]), int(shard["n_tokens"])
        for key in ("tokens", "lengths"):
            if not re.fullmatch(r"part-\d+-of-\d+-\d+\.\w+\.bin", shard[key]):
                raise ValueError(f"a shard is named {shard[key]!r}")


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
    part: Part = Part(),
    say: Callable[[str], None] = lambda _: None,
) -> ShardSet | None:
    """Encode documents into shards, resuming after the shards that are finished, and return the folder opened.

    Each document is stored with `bos` and `eos` where given. With `part`, only every count-th document is encoded;
    None is returned while other parts are missing. Memory stays bounded: one shard and the batches in flight.
    Raises: ArtifactError if the folder was begun with another identity; OutputError if it cannot be written;
    MemoryLimitError if a worker process was killed.
    """
    folder = Path(folder)
    identity = {**identity, "vocab_size": vocab_size, "bos": bos, "eos": eos, "part_count": part.count}
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    begun = resume_state(folder, part, identity)
    own = (text for number, text in enumerate(documents) if number % part.count == part.index)
    rest = islice(own, sum(shard["n_documents"] for shard in begun), None)
    writer = _Writer(folder, part, dtype, identity, begun, shard_tokens)
    for ids in encode_all(rest, encode_batch, workers):
        writer.add([*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])])
    writer.finish()
    say(f"{writer.n_documents:,} documents, {writer.n_tokens:,} tokens in {folder}")
    if part.count > 1 and len(list(folder.glob("part-*-of-*.json"))) < part.count:
        return None
    return ShardSet.open(folder)


class RowWriter:
    """Writes rows of ids that are made one at a time, such as those of two folders side by side.

    Nothing is there before `finish`; rows of an earlier attempt are written again.
    """

    def __init__(self, folder: Path, vocab_size: int, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        full = {**identity, "vocab_size": vocab_size, "bos": None, "eos": None, "part_count": 1}
        self.writer = _Writer(folder, Part(), "<u2" if vocab_size <= 1 << 16 else "<u4", full, [], SHARD_TOKENS)

    def add(self, ids: Sequence[int]) -> None:
        """Append a row."""
        self.writer.add(ids)

    def finish(self) -> ShardSet:
        """Write what is left and the manifest, and return the folder opened."""
        self.writer.finish()
        return ShardSet.open(self.folder)


def resume_state(folder: Path, part: Part, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the finished shards of this part.

    Raises: ArtifactError if they were made from something else.
    """
    state = folder / f".{part.stem}.progress.json"
    final = folder / f"{part.stem}.json"
    for path in (final, state):
        if path.exists():
            known = read_manifest(path)
            wrong = [key for key, value in identity.items() if known.get(key) != value]
            if wrong:
                raise ArtifactError(f"`{folder}` was encoded with another `{wrong[0]}`", "choose a new folder with -o")
            return list(known["shards"])
    for path in sorted(folder.glob("part-*-of-*.json"))[:1]:  # another part of this corpus, or of another
        known = read_manifest(path)
        wrong = [key for key, value in identity.items() if known.get(key) != value]
        if "part_count" in wrong:
            raise ArtifactError(
                f"`{folder}` holds parts of another split than {part.count}", "choose a new folder with -o"
            )
        if wrong:
            raise ArtifactError(f"`{folder}` was encoded with another `{wrong[0]}`", "choose a new folder with -o")
    return []


class _Writer:
    """Collects tokens, publishes a shard when it is full, and the manifest at the end."""

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
        # Packed as on disk: a list of arrays would weigh a hundred bytes for every short document.
        self.tokens = array(TYPE_CODES[self.dtype])
        self.lengths = array("q")

    @property
    def n_documents(self) -> int:
        return sum(int(shard["n_documents"]) for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        return sum(int(shard["n_tokens"]) for shard in self.shards)

    def add(self, ids: Sequence[int]) -> None:
        self.tokens.extend(ids)
        self.lengths.append(len(ids))
        if len(self.tokens) >= self.shard_tokens:
            self.publish()

    def publish(self) -> None:
        """Write the shard that is full, then the progress file that counts it."""
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


def encode_all(documents: Iterable[str], encode_batch: EncodeBatch, workers: int) -> Iterator[list[int]]:
    """Yield the ids of every document in order, encoded in batches, over processes if more than one is asked.

    Text of one batch is not worth a process. At most two batches per process are in flight.
    Raises: MemoryLimitError if a process was killed, which is what a system does that runs out of memory.
    """
    batches = batched_by_size(documents)
    first = list(islice(batches, 2))
    if workers <= 1 or len(first) < 2:
        for batch in chain(first, batches):
            yield from encode_batch(batch)
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Started fresh, not forked: a process that has used torch or threads must not be copied.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encode_batch,))
    pending: deque[Future[list[list[int]]]] = deque()
    try:
        for batch in chain(first, batches):
            pending.append(pool.submit(_work, batch))
            if len(pending) >= 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise MemoryLimitError(
            f"one of {workers} processes that encode text was killed", "fewer --workers need less memory; it resumes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(encode_batch: EncodeBatch) -> None:
    global _encode  # noqa: PLW0603 - one copy per worker process, not per batch
    _encode = encode_batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; only the parent answers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's end, however sudden, and leave too: a killed job must not leave processes behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(batch: list[str]) -> list[list[int]]:
    assert _encode is not None
    return _encode(batch)


def batched_by_size(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into batches of about BATCH_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
