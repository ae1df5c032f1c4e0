"""Token shards on disk, memory-mapped; parts written by different processes or hosts merge by lying in one folder.

Per part i of n, a folder contains shard files of raw little-endian token ids, the length of every document, and a
manifest that lists them. Knows no tokenizer.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.files import file_sha256, parse_json

VERSION = 1
SHARD_TOKENS = 1 << 25
MAX_PARTS = 99_999

PER_PART = {"part_index", "n_documents", "n_tokens", "shards"}
"""Keys in which the manifests of two parts of one corpus may differ."""

Ints = NDArray[np.int64]
TYPE_CODES = {"<u2": "H", "<u4": "I"}
"""The id types on disk as type codes of the module `array`."""


@dataclass(frozen=True)
class Part:
    """Part `index` (from 0) of `count` parts of a corpus."""

    index: int = 0
    count: int = 1

    @property
    def stem(self) -> str:
        """The common prefix of this part's file names."""
        return f"part-{self.index:05d}-of-{self.count:05d}"


WHOLE = Part()
"""A corpus encoded in one part."""


def parse_part(text: str) -> Part:
    """Parse `i/n`, i from 0 to n - 1.

    Raises: UsageError showing the value.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 0 <= int(match[1]) < int(match[2]):
        raise UsageError(f"`--shard {text}` is not a valid part", "write i/n with i from 0 to n-1, such as 0/4")
    return Part(int(match[1]), int(match[2]))


class ShardSet:
    """All parts of a shard folder as one sequence of documents, part by part."""

    def __init__(self, folder: Path, manifests: Sequence[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.manifest = dict(manifests[0])
        self.vocab_size: int = self.manifest["vocab_size"]
        self._shards = shards = [shard for manifest in manifests for shard in manifest["shards"]]
        dtype = np.dtype(self.manifest["dtype"])
        # Lengths are read into memory (8 bytes per document); tokens stay mapped.
        self._tokens = [map_array(folder / shard["tokens"], dtype) for shard in shards]
        self._paths = [folder / shard["tokens"] for shard in shards]
        lengths = [map_array(folder / shard["lengths"], np.dtype("<i8")) for shard in shards]
        self.lengths: Ints = np.concatenate([*lengths, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        self.n_documents = len(self.lengths)
        self.n_tokens = int(self.lengths.sum())
        self._first_document = np.cumsum([0, *map(len, lengths)])
        offsets = [np.cumsum(each) - each for each in lengths]  # a document's first token, within its shard
        self._offsets: Ints = np.concatenate([*offsets, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        # A truncated file would otherwise surface as wrong text in the middle of training.
        for shard, tokens, each in zip(shards, self._tokens, lengths, strict=True):
            if len(tokens) != int(each.sum()) or len(tokens) != shard["n_tokens"] or (each < 0).any():
                raise ArtifactError(
                    f"`{folder / shard['tokens']}` has {len(tokens)} tokens, but its documents have {int(each.sum())} "
                    f"and its manifest lists {shard['n_tokens']}",
                    "encode the corpus again into a new folder",
                )

    @classmethod
    def open(cls, folder: str | Path) -> "ShardSet":
        """Open a folder with all its parts.

        Raises: NotFoundError if it contains no shards, ArtifactError if a part is missing, damaged, or of another
        tokenizer or source.
        """
        folder = Path(folder)
        manifests = [read_manifest(path) for path in sorted(folder.glob("part-*.json"))]
        if not manifests:
            raise NotFoundError(f"`{folder}` contains no token shards", "`llmctl tokenize encode` creates them")
        count = manifests[0]["part_count"]
        existing = {manifest["part_index"] for manifest in manifests}
        missing = sorted(set(range(count)) - existing)
        if missing:
            names = ", ".join(f"{index}/{count}" for index in missing[:8])
            raise ArtifactError(
                f"`{folder}` lacks {len(missing)} of {count} parts: {names}", "encode them with --shard"
            )
        for manifest in manifests:
            for key in sorted((manifest.keys() | manifests[0].keys()) - PER_PART):
                if manifest.get(key) != manifests[0].get(key):
                    raise ArtifactError(
                        f"the parts in `{folder}` differ in `{key}`", "encode them again into a new folder"
                    )
        return cls(folder, manifests)

    def verify(self) -> "ShardSet":
        """Check the sha256 of every shard; reads all of them once.

        Raises: ArtifactError naming the file, and the first byte if an id is not one of the vocabulary.
        """
        for shard, path, tokens in zip(self._shards, self._paths, self._tokens, strict=True):
            for start in range(0, len(tokens), SHARD_TOKENS):
                self._checked(path, tokens, start, min(start + SHARD_TOKENS, len(tokens)))
            if "sha256" in shard and file_sha256(path) != shard["sha256"]:
                raise ArtifactError(
                    f"`{path}` is damaged: it does not match its sha256 in the manifest",
                    "encode the corpus again into a new folder",
                )
        return self

    def _checked(self, path: Path, tokens: NDArray[np.integer[Any]], start: int, stop: int) -> NDArray[np.integer[Any]]:
        """Return tokens of a shard whose ids are in the vocabulary: any other is no row of the embedding."""
        found = tokens[start:stop]
        if found.size and int(found.max()) >= self.vocab_size:
            at = start + int(np.argmax(found >= self.vocab_size))
            raise ArtifactError(
                f"`{path}` is damaged at byte {at * tokens.itemsize}: the id {tokens[at]} is not in the vocabulary of "
                f"{self.vocab_size}",
                "encode the corpus again into a new folder",
            )
        return found

    def document(self, index: int) -> NDArray[np.integer[Any]]:
        """Return the tokens of a document as a view of the memory-mapped file.

        Raises: ArtifactError for an id that is not in the vocabulary.
        """
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        start = int(self._offsets[index])
        return self._checked(self._paths[shard], self._tokens[shard], start, start + int(self.lengths[index]))

    def content_sha256(self) -> str:
        """Return the sha256 of all document lengths and tokens, independent of their division into files."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for tokens in self._tokens:
            digest.update(np.ascontiguousarray(tokens).data)
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Ints:
        """Return tokens `start` to `stop` of the concatenation of all documents."""
        pieces = []
        at = 0
        for path, tokens in zip(self._paths, self._tokens, strict=True):
            begin, end = max(start - at, 0), min(stop - at, len(tokens))
            if begin < end:
                pieces.append(np.asarray(self._checked(path, tokens, begin, end), dtype=np.int64))
            at += len(tokens)
        return np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])


def is_shard_folder(path: Path) -> bool:
    """Tell whether a folder contains token shards."""
    return path.is_dir() and any(path.glob("part-*-of-*.json"))


def is_begun(folder: Path, part: Part) -> bool:
    """Tell whether a part has been encoded, completely or in part."""
    return any((folder / name).exists() for name in (f"{part.stem}.json", f".{part.stem}.progress.json"))


def map_array(path: Path, dtype: np.dtype[Any]) -> NDArray[np.integer[Any]]:
    """Memory-map a file of numbers; an empty file, which mmap refuses, gives an empty array."""
    try:
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"shard `{path}` cannot be read: {error}", "encode the corpus again into a new folder"
        ) from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a part's manifest.

    Raises: ArtifactError if it is damaged or of another version.
    """
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise ArtifactError(
                f"`{path}` has format version {manifest['version']}, but this program reads version {VERSION}",
                "encode the corpus again into a new folder",
            )
        check_manifest(manifest)
        return dict(manifest)
    except KeyError as error:
        reason = f"it has no {error}"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)[:300]
    raise ArtifactError(f"shard manifest `{path}` is damaged: {reason}", "encode the corpus again into a new folder")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Check that a manifest is complete and that its file names point into its own folder.

    Raises: KeyError, TypeError or ValueError with the reason.
    """
    for key, least, most in (("part_count", 1, MAX_PARTS), ("part_index", 0, MAX_PARTS), ("vocab_size", 1, 1 << 31)):
        if type(manifest[key]) is not int or not least <= manifest[key] <= most:
            raise ValueError(f"{key} is {str(manifest[key])[:40]}")
    if manifest["part_index"] >= manifest["part_count"]:
        raise ValueError(f"part_index is {manifest['part_index']} of {manifest['part_count']}")
    for key in ("tokenizer_sha256", "source_sha256"):
        if not isinstance(manifest[key], str):
            raise TypeError(f"{key} is no text")
    if manifest["dtype"] not in TYPE_CODES:
        raise ValueError(f"dtype is {manifest['dtype']!r}")
    for shard in manifest["shards"]:
        for key in ("n_documents", "n_tokens"):
            if type(shard[key]) is not int or not 0 <= shard[key] < 1 << 62:
                raise ValueError(f"{key} is {str(shard[key])[:40]}")
        for key in ("tokens", "lengths"):
            if not re.fullmatch(r"part-\d+-of-\d+-\d+\.\w+\.bin", shard[key]):  # no path separators
                raise ValueError(f"a shard is named {shard[key]!r}")
