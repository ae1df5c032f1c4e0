"""Prepare examples for fine-tuning: encode, split and check them, and write them into the run folder.

Rows are streamed to disk; only hashes and labels of each stay in memory.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.artifacts.load import Loaded
from llmctl.config import TaskConfig
from llmctl.data.conversations import read_conversations
from llmctl.data.examples import read_examples
from llmctl.data.labels import Labels, labels_of, read_names
from llmctl.data.preferences import read_preferences
from llmctl.data.shard_writer import RowWriter
from llmctl.data.templates import template_for
from llmctl.errors import UsageError
from llmctl.inference.chat_template import ChatTemplate, chat_template
from llmctl.inference.encoding import require_tokenizer
from llmctl.preparing.corpus import Corpus, is_read_once, pairs_sha256, split_groups, spool
from llmctl.preparing.diagnostics import Findings
from llmctl.preparing.example_rows import (
    Encoder,
    ExampleRow,
    conversation_rows,
    labeled_rows,
    prompt_rows,
    source_rows,
)
from llmctl.preparing.preference_rows import preference_rows
from llmctl.preparing.soft_targets import WHOLE, SoftTargets

SOFT = ("soft_ids", "soft_shares")
"""Names of the targets among a corpus's other data."""

MIN_EXAMPLES = 2
"""One to train on and one to hold out."""


def prepare_examples(
    config: TaskConfig, folder: Path, base: Loaded, other: Loaded | None = None
) -> tuple[Corpus, Findings, ExampleRow]:
    """Read, encode and split the examples of a run; return the corpus, the findings, and the first example.

    other: a model in whose tokens and chat template conversations are encoded as well.

    Raises: UsageError for unusable data, naming file, line and column; errors of the readers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    findings = Findings()
    paths, val_paths = (
        [spool_examples(path, folder / f"{kind}-{n}") if is_read_once(path) else path for n, path in enumerate(part)]
        for kind, part in (("pipe", config.data.paths), ("val-pipe", config.data.val_paths))
    )
    encoder, rows_of = make_encoder(config, base, findings, [*paths, *val_paths], other)
    tokenizer = require_tokenizer(base)
    identity = {"tokenizer_sha256": tokenizer.sha256, "source_sha256": pairs_sha256([*paths, *val_paths])}
    shapes = [one.model.config for one in (base, other) if one is not None]
    rows = RowStore(folder, max(max(shape.vocab_size, shape.source_vocab_size) for shape in shapes), identity)
    n_train = rows.take(rows_of(paths))
    n_rows = rows.take(rows_of(val_paths)) if val_paths else n_train
    if n_rows < MIN_EXAMPLES or (val_paths and n_train in (0, n_rows)):
        raise UsageError(
            f"the data has {n_train} usable training examples and {n_rows - n_train} held out",
            "; ".join(findings.problems()) or "provide at least two examples",
        )
    held_out = np.arange(n_train, n_rows)
    if not val_paths:
        held_out = split_groups(rows.keys, config.data.val_frac, config.train.seed)
    rows.examine(findings, held_out)
    provenance = {
        "paths": list(config.data.paths),
        "sha256": identity["source_sha256"],
        "examples": n_rows,
        "task": task_record(encoder),
    }
    corpus = rows.finish(provenance, base, held_out)
    findings.n_rows, findings.n_held_out = n_rows, len(held_out)
    assert rows.first is not None
    return corpus, findings, rows.first


def spool_examples(path: str, base: Path) -> str:
    """Copy piped examples to a file, with a suffix by content: .jsonl or .txt."""
    spooled = spool(path, base)
    with spooled.open("rb") as file:
        is_json = file.read(1) in (b"{", b"[")
    named = base.with_suffix(".jsonl" if is_json else ".txt")
    shutil.copyfile(spooled, named)
    return str(named)


def task_record(encoder: Encoder) -> dict[str, Any]:
    """Return the task description stored in the corpus and the model."""
    record: dict[str, Any] = {"name": encoder.config.task}
    if encoder.config.task == "classify":
        record |= {"problem": encoder.labels.problem, "labels": list(encoder.labels.names)}
    if encoder.template:
        record["template"] = encoder.template
    return record


RowsOf = Callable[[list[str]], Iterator[ExampleRow]]


def make_encoder(
    config: TaskConfig, base: Loaded, findings: Findings, all_paths: list[str], other: Loaded | None = None
) -> tuple[Encoder, RowsOf]:
    """Return the encoder of a task, and the function that reads rows from files."""
    task, family = config.task, base.model.config.family
    if task == "chat":
        other_chat = None if other is None else chat_of(other)
        soft = SoftTargets(require_tokenizer(base)) if config.data.logprobs else None
        encoder = Encoder(config, base, findings, chat=chat_of(base), other_chat=other_chat, soft=soft)
        return encoder, lambda paths: conversation_rows(
            encoder, read_conversations(paths, messages_key=config.columns.messages)
        )
    if task == "prefer":
        encoder = Encoder(config, base, findings, chat=chat_of(base))
        return encoder, lambda paths: preference_rows(encoder, read_preferences(paths))
    if task == "classify":
        labels = find_labels(config, base, all_paths)
        encoder = Encoder(config, base, findings, labels=labels)
        return encoder, lambda paths: labeled_rows(encoder, read_examples(paths, task, config.columns))
    encoder = Encoder(config, base, findings, template=template_for(task, family, config.template))
    make = source_rows if family == "encoder_decoder" else prompt_rows
    return encoder, lambda paths: make(encoder, read_examples(paths, task, config.columns))


def chat_of(base: Loaded) -> ChatTemplate:
    """Return the chat template of a model, or the plain one."""
    return chat_template(require_tokenizer(base), base.artifact.files, begins_with_bos=bool(base.frame.before))


def find_labels(config: TaskConfig, base: Loaded, paths: list[str]) -> Labels:
    """Return the labels: from the config, else the model's head, else the data."""
    problem = None if config.problem == "auto" else config.problem
    names: tuple[str, ...] = config.labels
    if len(names) == 1 and Path(names[0]).is_file():
        names = read_names(names[0])
    head = base.model.config
    if not names and head.n_labels and head.labels:
        names, problem = head.labels, problem or head.problem
    return labels_of(read_examples(paths, "classify", config.columns), names, problem)


class RowStore:
    """Streams rows to disk, and keeps the hashes and labels needed for splitting and checks."""

    def __init__(self, folder: Path, vocab_size: int, identity: dict[str, str]) -> None:
        self.folder, self.vocab_size, self.identity = folder, vocab_size, identity
        self.writers: dict[str, RowWriter] = {}
        self.values: list[tuple[float, ...]] = []
        self.first_lengths: list[int] = []
        self.keys: list[str] = []
        self.answers: list[str] = []
        self.places: list[str] = []
        self.first: ExampleRow | None = None
        self.n_tokens = self.n_trained = 0

    def take(self, rows: Iterable[ExampleRow]) -> int:
        """Write rows and return the total number so far."""
        rows = iter(rows)
        head = next(rows, None)
        if self.first is None:
            self.first = head
        for row in chain([head] if head else [], rows):
            self.add(row)
        return len(self.keys)

    def add(self, row: ExampleRow) -> None:
        """Write one row."""
        self.writer("documents").add(row.ids)
        if row.trained:
            self.writer("targets").add(row.trained)
        elif row.target:
            self.writer("targets").add(row.target)
        if row.other is not None:
            self.writer("other_documents").add(row.other.ids)
            self.writer("other_targets").add(row.other.is_trained)
        self.add_soft(row)
        self.values.append(row.values)
        self.first_lengths.append(row.first_length)
        self.keys.append(digest(row.key))
        self.answers.append(digest(row.answer))
        self.places.append(row.where)
        self.n_tokens += len(row.ids) + len(row.target)
        self.n_trained += sum(row.trained[1:]) + len(row.target)

    def add_soft(self, row: ExampleRow) -> None:
        """Write the targets of a row; those of rows without any are empty, from the first row that has some."""
        if row.soft is None and SOFT[0] not in self.writers:
            return
        is_first = SOFT[0] not in self.writers
        for name, own in zip(SOFT, row.soft or ([], []), strict=True):
            writer = self.writer(name)
            for _ in self.keys if is_first else ():
                writer.add([])
            writer.add(own)

    def writer(self, name: str) -> RowWriter:
        """Return the writer of a part, creating it on first use."""
        if name not in self.writers:
            n_values = WHOLE + 1 if name == SOFT[1] else self.vocab_size
            self.writers[name] = RowWriter(self.folder / name, n_values, self.identity)
        return self.writers[name]

    def examine(self, findings: Findings, held_out: NDArray[np.int64]) -> None:
        """Count duplicates, contradictions, and examples on both sides of the split."""
        is_held_out = np.zeros(len(self.keys), dtype=bool)
        is_held_out[held_out] = True
        seen: dict[str, dict[str, bool]] = {}
        for index, (key, answer, held) in enumerate(zip(self.keys, self.answers, is_held_out.tolist(), strict=True)):
            others = seen.setdefault(key, {})
            if answer in others:
                findings.note("duplicated", self.places[index])
            elif others and self.values[index] and not self.n_trained:  # for text targets, several answers may be right
                findings.note("contradicted", self.places[index])
            if held and not all(others.values()):
                findings.note("leaked", self.places[index])
            # True while the answer occurs only in the held-out part.
            others[answer] = others.get(answer, True) and held
        findings.n_tokens, findings.n_trained_tokens = self.n_tokens, self.n_trained

    def finish(self, provenance: dict[str, Any], base: Loaded, held_out: NDArray[np.int64]) -> Corpus:
        """Close the files and return the corpus."""
        parts = {name: writer.finish() for name, writer in self.writers.items()}
        arrays: dict[str, NDArray[Any]] = {}
        if self.values[0]:
            arrays["values"] = np.array(self.values, dtype=np.float64)
            arrays["first_lengths"] = np.array(self.first_lengths, dtype=np.int64)
        train = np.setdiff1d(np.arange(len(self.keys)), held_out)
        documents, targets = parts.pop("documents"), parts.pop("targets", None)
        return Corpus(require_tokenizer(base), documents, targets, train, held_out, provenance, arrays, parts)


def digest(text: str) -> str:
    """Return a short hash of a text, to compare texts without storing them."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
