"""Texts that a teacher writes, for students that learn nothing but text: of another vocabulary, or of sequences.

Source: Kim and Rush 2016, arXiv:1606.07947, section 3.2: the teacher's best sequence stands for all of them. A decoder has
no source to answer, so it goes on from the beginnings of the texts, drawn as it would speak.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig, TaughtConfig
from llmctl.errors import UsageError
from llmctl.files import write_bytes
from llmctl.inference.generate import Prompt, generate
from llmctl.preparing.corpus import Corpus, Ints
from llmctl.runs.progress import Say
from llmctl.tables.tasks import TASKS
from llmctl.training.task_data import prepare_task

PART_ROWS = 512
"""Rows of a file; a run that was stopped writes only those of the files that are missing."""

PROMPT_TOKENS = 16
"""Tokens of a text that a decoder goes on from, at most half of it: what is left is the teacher's."""


def write_texts(config: TaughtConfig, teacher: Loaded, folder: Path, say: Say) -> TaughtConfig:
    """Let a teacher write the training part of a run's data again, and return the config that reads what it wrote.

    The held-out part stays the data's own. What a row becomes depends on the row alone, so that parts that are there
    already need not be made again.
    Raises: UsageError for a task whose examples are no plain texts or pairs.
    """
    family, task = teacher.model.config.family, config.task
    pair_tasks = ("text", *(name for name, row in TASKS.items() if row.is_pairs))
    if task not in (("text",) if family == "decoder" else pair_tasks):
        raise UsageError(
            f"`--loss seq` does not support `--task {task}` of {family.replace('_', '-')} models",
            "text of a decoder; text, translate or summarize of an encoder-decoder",
        )
    corpus = prepare_task(config, teacher, folder / "given", say)
    if family == "encoder_decoder" and corpus.targets is None:
        raise UsageError(
            f"`{config.model}` was trained on span corruption, `--loss seq` needs pairs",
            "--task translate with pairs",
        )
    made = folder / "made"
    made.mkdir(parents=True, exist_ok=True)
    train = corpus.train
    n_parts = -(-len(train) // PART_ROWS)
    for number in range(n_parts):
        path = made / f"part-{number:05d}.jsonl"
        if path.exists():
            continue
        rows = train[number * PART_ROWS : (number + 1) * PART_ROWS]
        write_bytes(path, lines(answer(config, teacher, corpus, rows)))
        say(f"the teacher has generated {min(len(train), (number + 1) * PART_ROWS):,} of {len(train):,} texts")
    held_out = folder / "held-out.jsonl"
    write_bytes(held_out, lines(given(teacher, corpus, corpus.held_out)))
    data = replace(
        config.data,
        paths=(str(made),),
        val_paths=(str(held_out),),
        text_key="text",
        source_key="source",
        target_key="target",
    )
    # What a template made of the source is in the source by now.
    template = "{source}" if TASKS[task].is_pairs else config.template
    return replace(
        config, data=data, columns=replace(config.columns, source="source", target="target"), template=template
    )


def answer(config: TaughtConfig, teacher: Loaded, corpus: Corpus, numbers: Ints) -> Iterator[dict[str, str]]:
    """Yield what a teacher makes of documents, as rows of training data."""
    tokenizer = corpus.tokenizer
    is_decoder = teacher.model.config.family == "decoder"
    prompts = []
    for number in numbers.tolist():
        ids = corpus.documents.document(number).tolist()
        if is_decoder:
            ids = beginning(ids, tokenizer.eos_id)
        elif tokenizer.eos_id is not None:
            ids = [*ids, tokenizer.eos_id]
        prompts.append(Prompt(number, ids[: teacher.model.config.max_positions - 1], ""))
    settings = GenerateConfig(
        max_tokens=min(config.teacher.max_tokens, config.train.seq_len),
        temperature=1.0 if is_decoder else 0.0,
        beams=1 if is_decoder else config.teacher.beams,
        seed=config.train.seed,
        batch_size=32,
    )
    for prompt, found in zip(prompts, generate(teacher, prompts, settings), strict=True):
        if is_decoder:
            yield {"text": tokenizer.decode([*prompt.ids, *found.ids])}
        else:
            yield {"source": source_text(corpus, prompt.index), "target": found.text.strip()}


def beginning(ids: list[int], eos_id: int | None) -> list[int]:
    """Return what a decoder goes on from: the first tokens of a text, and never its end, after which another would begin."""
    inner = ids[:-1] if ids[-1:] == [eos_id] else ids
    return inner[: max(1, min(PROMPT_TOKENS, len(inner) // 2))] or ids


def given(teacher: Loaded, corpus: Corpus, numbers: Ints) -> Iterator[dict[str, str]]:
    """Yield documents of the data as rows, as they are."""
    for number in numbers.tolist():
        if teacher.model.config.family == "decoder":
            yield {"text": source_text(corpus, number)}
        else:
            assert corpus.targets is not None
            target = corpus.tokenizer.decode(corpus.targets.document(number).tolist())
            yield {"source": source_text(corpus, number), "target": target}


def source_text(corpus: Corpus, number: int) -> str:
    """Return a document as text."""
    return corpus.tokenizer.decode(corpus.documents.document(number).tolist())


def lines(rows: Iterator[dict[str, str]]) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
