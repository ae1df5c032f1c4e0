"""Evaluate heads over tokens: the entities of tagged words, and the answers that are parts of a context."""

from collections.abc import Sequence

from llmctl.artifacts.load import Loaded
from llmctl.config import EvaluateConfig
from llmctl.data.examples import Example
from llmctl.errors import UsageError
from llmctl.evaluating.result import Measured
from llmctl.inference.encoding import longest_row
from llmctl.inference.entities import kind_of, label_words, names_of
from llmctl.inference.spans import find_answers
from llmctl.metrics import scores


def evaluate_spans(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Score the answers that a head finds in contexts; no answer is right where the row has none.

    Raises: UsageError for a row without a context.
    """
    for example in examples:
        if "context" not in example.inputs:
            raise UsageError(
                f"{example.where} has no context, in which `{loaded.artifact.path}` finds the answers",
                "name its column with --set columns.context=NAME",
            )
    questions = [(example.inputs["question"], example.inputs["context"]) for example in examples]
    answers = find_answers(loaded, questions, seq_len=config.seq_len, batch_size=config.batch_size)
    found = [answer.text for answer in answers]
    references = [example.target or [""] for example in examples]
    return Measured(
        {name: scores.TEXT_SCORES[name](found, references) for name in ("exact_match", "token_f1")},
        n_rows=len(examples),
        n_tokens=sum(len(ids) for pair in questions for ids in encoded(loaded, pair)),
        n_empty=sum(not context.strip() for _, context in questions),
        n_cut=sum(answer.is_cut for answer in answers),
        example={"prompt": questions[0][0], "found": found[0], "wanted": references[0][0]},
    )


def encoded(loaded: Loaded, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, to count them."""
    assert loaded.tokenizer is not None
    return loaded.tokenizer.encode_batch(texts)


def evaluate_entities(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Score the entities of tagged words: a word has the label of its first token.

    Raises: UsageError if the model knows none of the kinds of entities of the data.
    """
    names = names_of(loaded)
    wanted = [tags_of(example, names) for example in examples]
    kinds = {kind_of(tag) for tags in wanted for tag in tags} - {"O"}
    if kinds and not kinds & {kind_of(name) for name in names}:
        raise UsageError(
            f"`{loaded.artifact.path}` knows none of the tags of the data: {', '.join(sorted(kinds)[:8])}",
            f"its labels are {', '.join(names[:12])}",
        )
    rows = [example.inputs["tokens"].split("\n") if example.inputs["tokens"] else [] for example in examples]
    found = label_words(loaded, rows, longest_row(loaded, config.seq_len), config.batch_size)
    return Measured(
        scores.entity_scores(found, wanted),
        n_rows=len(examples),
        n_tokens=sum(map(len, encoded(loaded, [" ".join(row) for row in rows]))),
        n_empty=sum(not row for row in rows),
    )


def tags_of(example: Example, names: Sequence[str]) -> list[str]:
    """Return the tags of an example by name; numbers are those of the model's labels.

    Raises: UsageError for a number that is none.
    """
    for tag in example.target:
        if isinstance(tag, int) and not 0 <= tag < len(names):
            raise UsageError(
                f"{example.where}: `{example.column}` has the tag {tag}, but the model has {len(names)} labels",
                "write the tags by name",
            )
    return [names[tag] if isinstance(tag, int) else tag for tag in example.target]
