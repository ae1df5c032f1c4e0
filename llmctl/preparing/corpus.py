"""Prepare a corpus: from text files, or the built-in corpus, to a tokenizer, shards on disk, and a split.

Text is streamed two or three times and is never in memory as a whole.
"""

import io
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.config import DataConfig, PretrainConfig, TokenizerConfig
from llmctl.data.builtin import builtin_documents, builtin_pairs, builtin_provenance
from llmctl.data.pairs import read_pairs, two_files
from llmctl.data.shard_writer import write_shards
from llmctl.data.shards import ShardSet, is_shard_folder
from llmctl.data.sources import read_documents, source_sha256
from llmctl.data.text_files import Blank
from llmctl.errors import ArtifactError, UsageError
from llmctl.files import atomic_path, hash64, parse_json, read_own, write_bytes, write_json
from llmctl.preparing.duplicates import (
    as_hashes,
    describe_duplicates,
    document_hashes,
    groups_of,
    hashes_of,
)
from llmctl.runs.progress import Say
from llmctl.tables.objectives import OBJECTIVES
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import load_tokenizer, tokenizer_from_files
from llmctl.tokenizer.train import train_tokenizer

Ints = NDArray[np.int64]

MANY_CHARACTERS = 50_000_000
"""From this many characters on, encoding starts one process per core."""

CORPUS = "corpus.json"
"""The file that describes a prepared corpus."""

FEW_DOCUMENTS = 20
"""With fewer documents than this, the end of the text is held out instead of whole documents."""


@dataclass(frozen=True)
class Corpus:
    """Encoded documents, and the indices of the training and the held-out ones.

    For pairs, `documents` are the sources and `targets` the targets, under the same indices.
    """

    tokenizer: Tokenizer
    documents: ShardSet
    targets: ShardSet | None
    train: Ints
    held_out: Ints
    provenance: dict[str, Any]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Further data per document, by name: labels, lengths."""
    others: dict[str, ShardSet] = field(default_factory=dict)
    """The same documents in other tokens, by name."""

    def held_out_bytes(self) -> int:
        """Return the size of the held-out text in bytes, without decoding it."""
        shards, token_bytes = self.targets or self.documents, self.tokenizer.token_bytes()
        return sum(int(token_bytes[shards.document(int(index))].sum()) for index in self.held_out)

    def held_out_text(self) -> str:
        """Return the held-out documents as one text, to compare with compressors."""
        shards = self.targets or self.documents
        return "\n".join(self.tokenizer.decode(shards.document(int(index)).tolist()) for index in self.held_out)


@dataclass(frozen=True)
class Text:
    """A re-readable stream of documents, its length, the indices of the held-out ones, and what was found in the data."""

    read: Callable[[], Iterator[str]]
    held_out: Ints
    n_documents: int
    findings: list[str] = field(default_factory=list)

    def training(self) -> Iterator[str]:
        """Yield the training documents."""
        skipped = set(self.held_out.tolist())
        return (text for index, text in enumerate(self.read()) if index not in skipped)


def keep_corpus(corpus: Corpus, folder: Path) -> None:
    """Save the description of a corpus in `folder`; other processes and restarts open it with `open_corpus`."""
    for name, data in corpus.tokenizer.files().items():
        write_bytes(folder / "tokenizer" / name, data)
    for name, values in {"held_out": corpus.held_out, **corpus.arrays}.items():
        content = io.BytesIO()
        np.save(content, values, allow_pickle=False)
        write_bytes(folder / "arrays" / f"{name}.npy", content.getvalue())
    shards = {"documents": corpus.documents, "targets": corpus.targets, **corpus.others}
    paths = {name: shard_path(part.folder, folder) for name, part in shards.items() if part is not None}
    # Written last: once it exists, everything it names exists.
    write_json(folder / CORPUS, {"shards": paths, "provenance": corpus.provenance})


def shard_path(path: Path, folder: Path) -> str:
    """Return the path of shards, relative if they are inside the folder of the corpus."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path.resolve())


def open_corpus(folder: Path) -> Corpus:
    """Open a corpus that `keep_corpus` has saved.

    Raises: ArtifactError if a part of it is damaged or missing.
    """
    try:
        description = parse_json((folder / CORPUS).read_text(encoding="utf-8"))
        files = {path.name: read_own(path) for path in (folder / "tokenizer").iterdir()}
        arrays = {path.stem: np.load(path, allow_pickle=False) for path in (folder / "arrays").iterdir()}
        held_out = arrays.pop("held_out")
        shards = {name: ShardSet.open(folder / path) for name, path in description["shards"].items()}
        documents, targets = shards.pop("documents"), shards.pop("targets", None)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"the encoded data in `{folder}` is damaged: {error}", "start a new run") from error
    train = np.setdiff1d(np.arange(documents.n_documents), held_out)
    tokenizer = tokenizer_from_files(files)
    return Corpus(tokenizer, documents, targets, train, held_out, description["provenance"], arrays, shards)


def prepare_corpus(config: PretrainConfig, folder: Path, tokenizer: Tokenizer | None, say: Say) -> Corpus:
    """Read, split and encode the text of a run into `folder`.

    `tokenizer`: that of the model to continue from; if None, one is loaded or trained.
    Raises: UsageError for text that is too short or data without pairs; errors of the readers.
    """
    if tokenizer is None and config.tokenizer.path:
        tokenizer = load_tokenizer(config.tokenizer.path)
    if OBJECTIVES[config.objective].reads_pairs:
        return prepare_pairs(config, folder, tokenizer, say)
    if len(config.data.paths) == 1 and is_shard_folder(Path(config.data.paths[0])):
        return open_shards(config, Path(config.data.paths[0]), tokenizer, say)
    text, provenance = open_text(config, folder)
    for line in text.findings:
        say(line)
    if tokenizer is None:
        tokenizer = train_tokenizer(text.training(), sentinels_for(config))
        say(f"trained a {config.tokenizer.model_type} tokenizer with a vocabulary of {tokenizer.vocab_size:,}")
    bos = tokenizer.bos_id
    if "decoder" in OBJECTIVES[config.objective].families:
        bos = next(iter(tokenizer.frame("decoder").before), None)  # many published decoders have no begin token
    ends = bos, tokenizer.eos_id
    documents = encode(folder / "text", text.read(), tokenizer, config.data, provenance, *ends)
    train = np.setdiff1d(np.arange(text.n_documents), text.held_out)
    report_sizes(documents, train, text.held_out, say)
    return Corpus(tokenizer, documents, None, train, text.held_out, provenance)


def prepare_pairs(config: PretrainConfig, folder: Path, tokenizer: Tokenizer | None, say: Say) -> Corpus:
    """Read, split and encode pairs; pairs with the same source stay on one side of the split."""
    data = config.data
    if data.paths:
        keys = {"source_key": data.source_key, "target_key": data.target_key}
        blank = Blank()
        pairs = list(read_pairs(data.paths, **keys, blank=blank))
        n_train = len(pairs)
        pairs += read_pairs(data.val_paths, **keys, blank=blank) if data.val_paths else []
        for line in blank.lines("pairs"):
            say(line)
        provenance = {"paths": list(data.paths), "sha256": pairs_sha256([*data.paths, *data.val_paths])}
    else:
        pairs, provenance = builtin_pairs(), builtin_provenance() | {"kind": "pairs"}
    if len(pairs) < 2:
        raise UsageError(
            f"the data has {len(pairs)} pairs, but at least 2 are needed",
            "write one pair per line, `source<TAB>target`",
        )
    if data.paths and data.val_paths:
        held_out = np.arange(n_train, len(pairs))
        for line in describe_duplicates(hashes_of("\t".join(pair) for pair in pairs), held_out):
            say(line)
    else:
        held_out = split_groups([source for source, _ in pairs], data.val_frac, config.train.seed)
    train = np.setdiff1d(np.arange(len(pairs)), held_out)
    if tokenizer is None:
        tokenizer = train_tokenizer((side for index in train for side in pairs[index]), config.tokenizer)
        say(f"trained a {config.tokenizer.model_type} tokenizer with a vocabulary of {tokenizer.vocab_size:,}")
    sides = []  # batches add the end tokens
    for number, (side, own) in enumerate((("source", tokenizer), ("target", tokenizer.for_target))):
        bos = next(iter(own.frame("encoder_decoder").before), None)
        sides.append(encode(folder / side, (pair[number] for pair in pairs), own, data, provenance, bos))
    sources, targets = sides
    limit = config.train.seq_len - 1
    n_cut = int(((sources.lengths > limit) | (targets.lengths > limit)).sum())
    if n_cut:
        say(f"{n_cut:,} of {len(pairs):,} pairs are longer than train.seq_len {config.train.seq_len} and are truncated")
    say(f"{len(train):,} training pairs, {len(held_out):,} held out")
    return Corpus(tokenizer, sources, targets, train, held_out, provenance)


def pairs_sha256(paths: Sequence[str]) -> str:
    """Return the hash of pair files; a path may be two files with parallel lines, `a.en:a.de`."""
    return source_sha256([name for path in paths for name in (two_files(path) or (path,))])


def open_shards(config: PretrainConfig, folder: Path, tokenizer: Tokenizer | None, say: Say) -> Corpus:
    """Open a corpus written by `llmctl tokenize encode`; the last or randomly sampled documents are held out."""
    shards = ShardSet.open(folder).verify()
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
    if shards.manifest["tokenizer_sha256"] != tokenizer.sha256:
        raise UsageError(
            f"the shards in `{folder}` were encoded with a different tokenizer ({shards.manifest['tokenizer_sha256'][:12]}) "
            f"than the given one ({tokenizer.sha256[:12]})",
            "omit `--tokenizer`, or encode the corpus again",
        )
    if shards.vocab_size != tokenizer.vocab_size:
        raise ArtifactError(
            f"the shards in `{folder}` are of {shards.vocab_size} token ids, their tokenizer has {tokenizer.vocab_size}",
            "encode the corpus again",
        )
    n_documents = shards.n_documents
    if n_documents < 2:
        raise UsageError(
            f"the shards in `{folder}` contain {n_documents} documents, but at least 2 are needed",
            "encode with `--split line`",
        )
    hashes = document_hashes(n_documents, shards.document, shards.lengths)
    if config.data.val_tail:
        held_out = np.arange(n_documents - max(1, round(config.data.val_frac * n_documents)), n_documents)
    else:
        held_out = sample_groups(groups_of(hashes), config.data.val_frac, config.train.seed)
    for line in describe_duplicates(hashes, held_out):
        say(line)
    train = np.setdiff1d(np.arange(n_documents), held_out)
    return Corpus(
        tokenizer, shards, None, train, held_out, {"shards": str(folder), "sha256": shards.manifest["source_sha256"]}
    )


def open_text(config: PretrainConfig, folder: Path) -> tuple[Text, dict[str, Any]]:
    """Return the documents as a re-readable, split stream, with their provenance."""
    data = config.data
    if not data.paths:
        documents = builtin_documents()
        held_out = sample_groups(groups_of(hashes_of(documents)), data.val_frac, config.train.seed)
        return Text(lambda: iter(documents), held_out, len(documents)), builtin_provenance()
    paths = [
        str(spool(path, folder / f"pipe-{n}.txt")) if is_read_once(path) else path for n, path in enumerate(data.paths)
    ]

    val_paths = [
        str(spool(path, folder / f"val-pipe-{n}.txt")) if is_read_once(path) else path
        for n, path in enumerate(data.val_paths)
    ]

    blank = Blank()

    def read_part(paths: Sequence[str], blank: Blank | None = None) -> Iterator[str]:
        return read_documents(paths, text_key=data.text_key, split=data.split, blank=blank)

    def read() -> Iterator[str]:
        yield from read_part(paths)
        if val_paths:
            yield from read_part(val_paths)

    seen, n_characters = array("Q"), 0
    for document in read_part(paths, blank):
        seen.append(hash64(document.encode()))
        n_characters += len(document)
    n_documents = len(seen)
    if n_characters < 2:
        raise UsageError(
            f"the data `{' '.join(data.paths)}` contains no text",
            "name files with text, or none for the built-in corpus",
        )
    sha256 = source_sha256([*paths, *val_paths])
    provenance = {"paths": list(data.paths), "sha256": sha256, "n_characters": n_characters}
    if not val_paths and (data.val_tail or n_documents < FEW_DOCUMENTS):
        boundary = n_characters - max(1, round(data.val_frac * n_characters))
        return tail_split(read, boundary, blank.lines("documents")), provenance
    if val_paths:
        seen.extend(hash64(document.encode()) for document in read_part(val_paths, blank))
        held_out = np.arange(n_documents, len(seen))
        provenance |= {"held_out": list(data.val_paths)}
    else:
        held_out = sample_groups(groups_of(as_hashes(seen)), data.val_frac, config.train.seed)
    findings = [*blank.lines("documents"), *describe_duplicates(as_hashes(seen), held_out)]
    return Text(read, held_out, len(seen), findings), provenance


def tail_split(read: Callable[[], Iterator[str]], boundary: int, findings: list[str]) -> Text:
    """Hold out everything from character `boundary` on, splitting the document at it."""

    def pieces() -> Iterator[tuple[str, bool]]:
        at = 0
        for document in read():
            cut = min(max(boundary - at, 0), len(document))
            at += len(document)
            if cut:
                yield document[:cut], False
            if cut < len(document):
                yield document[cut:], True

    flags, seen = [], array("Q")
    for text, is_held_out in pieces():
        flags.append(is_held_out)
        seen.append(hash64(text.encode()))
    held_out = np.flatnonzero(flags).astype(np.int64)
    findings = [*findings, *describe_duplicates(as_hashes(seen), held_out)]
    return Text(lambda: (text for text, _ in pieces()), held_out, len(flags), findings)


def sample_held_out(n_documents: int, frac: float, seed: int) -> Ints:
    """Sample the held-out documents: at least one, never all."""
    n_held_out = min(max(1, round(frac * n_documents)), n_documents - 1)
    return np.sort(np.random.default_rng([seed, 1]).permutation(n_documents)[:n_held_out])


def split_groups(keys: Sequence[str], frac: float, seed: int) -> Ints:
    """Sample held-out rows such that rows with equal keys stay together."""
    numbers: dict[str, int] = {}
    return sample_groups(np.array([numbers.setdefault(key, len(numbers)) for key in keys]), frac, seed)


def sample_groups(groups: Ints, frac: float, seed: int) -> Ints:
    """Sample held-out rows of whole groups, which are numbered from 0; a single group is split."""
    n_groups = int(groups.max()) + 1
    if n_groups < 2:
        return sample_held_out(len(groups), frac, seed)
    return np.flatnonzero(np.isin(groups, sample_held_out(n_groups, frac, seed)))


def is_read_once(path: str) -> bool:
    """Return whether a path can be read only once: standard input, or a pipe such as a shell's `<(...)`."""
    return path == "-" or Path(path).is_fifo()


def spool(source: str, path: Path) -> Path:
    """Copy piped text to a file, so that it can be read more than once and after a restart."""
    if not path.exists():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            if source == "-":
                shutil.copyfileobj(sys.stdin.buffer, file)
            else:
                with Path(source).open("rb") as pipe:
                    shutil.copyfileobj(pipe, file)
    return path


def sentinels_for(config: PretrainConfig) -> TokenizerConfig:
    """Return the tokenizer settings with the maximum number of sentinels a row can need (span corruption)."""
    tokenizer, data = config.tokenizer, config.data
    if OBJECTIVES[config.objective].needs != "sentinels" or tokenizer.n_sentinels:
        return tokenizer
    needed = round(config.train.seq_len * data.mask_frac / data.mean_span_tokens) + 1
    return replace(tokenizer, n_sentinels=min(needed, 100))


def encode(
    folder: Path,
    documents: Iterator[str],
    tokenizer: Tokenizer,
    data: DataConfig,
    provenance: dict[str, Any],
    bos: int | None = None,
    eos: int | None = None,
) -> ShardSet:
    """Write documents as shards, with the given begin and end tokens around each."""
    is_large = int(provenance.get("n_characters", 0)) > MANY_CHARACTERS
    shards = write_shards(
        folder,
        documents,
        tokenizer.encode_batch,
        cut=tokenizer.cut,
        bos=bos,
        eos=eos,
        vocab_size=tokenizer.vocab_size,
        identity={"tokenizer_sha256": tokenizer.sha256, "source_sha256": str(provenance.get("sha256"))},
        workers=data.workers or ((os.cpu_count() or 1) if is_large else 1),
    )
    assert shards is not None, "a single part is always complete"
    return shards


def report_sizes(documents: ShardSet, train: Ints, held_out: Ints, say: Say) -> None:
    """Report the number of documents and tokens."""
    lengths = documents.lengths
    say(
        f"{len(train):,} training documents with {int(lengths[train].sum()):,} tokens, "
        f"{len(held_out):,} held out with {int(lengths[held_out].sum()):,}"
    )
