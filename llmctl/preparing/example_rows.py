"""Encode the examples of every task for training, one generator per kind of data.

Texts are encoded by the functions that `generate`, `chat` and `evaluate` use, so that training and inference see the
same ids. Truncated, dropped and suspicious examples are counted in Findings.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from llmctl.artifacts.load import Loaded
from llmctl.config import TaskConfig
from llmctl.data.conversations import Conversation, Message
from llmctl.data.examples import Example
from llmctl.data.labels import Labels
from llmctl.data.templates import fill_template
from llmctl.errors import UsageError
from llmctl.inference.chat_ids import Encoded, encode_conversation, end_of_turn_ids
from llmctl.inference.chat_template import ChatTemplate
from llmctl.inference.encoding import encode_prompt, encode_rows, encode_target, require_tokenizer
from llmctl.preparing.diagnostics import Findings
from llmctl.preparing.soft_targets import SoftTargets, Targets, checked_logprobs

AT_ONCE = 512
"""Examples encoded per batch."""


@dataclass(frozen=True)
class ExampleRow:
    """An encoded example.

    ids: model input; trained: which of them a decoder is trained on; target: target of an encoder-decoder; values:
    targets of a classification head; first_length: start of the second text of a pair; key, answer: examples with the
    same key are duplicates if their answers are equal, else contradictions where there are no trained tokens; other: the
    same as another model reads it; soft: probabilities for its tokens.
    """

    where: str
    ids: list[int]
    key: str
    answer: str
    trained: list[bool] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    values: tuple[float, ...] = ()
    first_length: int = 0
    other: Encoded | None = None
    soft: Targets | None = None


@dataclass(frozen=True)
class Encoder:
    """Settings, model and tokenizer that the examples of a run are encoded with."""

    config: TaskConfig
    base: Loaded
    findings: Findings
    template: str = ""
    chat: ChatTemplate | None = None
    other_chat: ChatTemplate | None = None
    soft: SoftTargets | None = None
    labels: Labels = Labels("single")

    @property
    def limit(self) -> int:
        """Maximum tokens per row."""
        return self.config.train.seq_len

    def too_long(self, where: str, n_tokens: int) -> bool:
        """Count an example that is too long, and return whether it is dropped.

        Raises: UsageError if `data.too_long` is refuse.
        """
        policy = self.config.data.too_long
        if policy == "refuse":
            raise UsageError(
                f"{where} has {n_tokens:,} tokens, but `train.seq_len` is {self.limit:,}",
                f"use `--seq-len {n_tokens}`, or `--set data.too_long=cut` or `drop`",
            )
        self.findings.note("dropped" if policy == "drop" else "cut", where)
        return policy == "drop"


def labeled_rows(encoder: Encoder, examples: Iterable[Example]) -> Iterator[ExampleRow]:
    """Yield labeled texts or pairs of texts."""
    examples = iter(examples)
    while window := list(islice(examples, AT_ONCE)):
        texts = [
            tuple(example.inputs[name] for name in ("text", "pair") if name in example.inputs) for example in window
        ]
        rows = encode_rows(encoder.base, texts, encoder.limit)
        for example, parts, row in zip(window, texts, rows, strict=True):
            value = encoder.labels.encode(example)
            if not any(part.strip() for part in parts):
                encoder.findings.note("empty", example.where)
                continue
            if row.n_cut and encoder.too_long(example.where, len(row.ids) + row.n_cut):
                continue
            values = tuple(map(float, value)) if isinstance(value, list) else (float(value),)
            for name in named_labels(encoder.labels, values):
                encoder.findings.labels[name] += 1
            first = row.types.index(1) if 1 in row.types else len(row.ids)
            yield ExampleRow(example.where, row.ids, "\0".join(parts), repr(values), values=values, first_length=first)


def named_labels(labels: Labels, values: Sequence[float]) -> list[str]:
    """Return the label names of an example; none for regression."""
    if labels.problem == "regression":
        return []
    if labels.problem == "single":
        return [labels.names[int(values[0])]]
    return [name for name, value in zip(labels.names, values, strict=True) if value]


def source_rows(encoder: Encoder, examples: Iterable[Example]) -> Iterator[ExampleRow]:
    """Yield sources and targets for an encoder-decoder; end tokens are added during batching."""
    limit = encoder.limit - max(len(encoder.base.frame.after), 1)
    for example in examples:
        source, answer = fill_template(encoder.template, example.inputs), first_answer(example)
        if not source.strip() or not answer.strip():
            encoder.findings.note("empty", example.where)
            continue
        ids, target = encode_prompt(encoder.base, source), encode_target(encoder.base, answer)
        ids = ids[: len(ids) - len(encoder.base.frame.after)]
        longest = max(len(ids), len(target))
        if longest > limit and encoder.too_long(example.where, longest + encoder.limit - limit):
            continue
        yield ExampleRow(example.where, ids[:limit], source, answer, target=target[:limit])


def prompt_rows(encoder: Encoder, examples: Iterable[Example]) -> Iterator[ExampleRow]:
    """Yield prompts and answers for a decoder; a long prompt is truncated at its beginning."""
    tokenizer = require_tokenizer(encoder.base)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for example in examples:
        prompt, text = fill_template(encoder.template, example.inputs), first_answer(example)
        if not any(part.strip() for part in example.inputs.values()) or not text.strip():
            encoder.findings.note("empty", example.where)
            continue
        ids = encode_prompt(encoder.base, prompt)
        answer = [*tokenizer.encode_next(f" {text}", after_special=False), *end]
        over = len(ids) + len(answer) - encoder.limit - 1
        if over > 0:
            if encoder.too_long(example.where, len(ids) + len(answer)):
                continue
            n_first = int(ids[0] == tokenizer.bos_id)
            kept = max(len(ids) - over, n_first + 1)
            ids = [*ids[:n_first], *ids[len(ids) - kept + n_first :]]
            answer = answer[: max(encoder.limit + 1 - len(ids), 0)]
        trained = [False] * len(ids) + [True] * len(answer)
        yield from trained_row(encoder, ExampleRow(example.where, ids + answer, prompt, text, trained))


def conversation_rows(encoder: Encoder, conversations: Iterable[Conversation]) -> Iterator[ExampleRow]:
    """Yield conversations with every assistant answer trained; a long conversation is truncated at its end."""
    assert encoder.chat is not None
    ends, findings = end_of_turn_ids(encoder.chat), encoder.findings
    for conversation in conversations:
        messages, where = list(conversation.messages), conversation.where
        if encoder.config.system and messages[0].role != "system":
            messages.insert(0, Message("system", encoder.config.system))
        template = encoder.chat.with_tools(conversation.tools)
        messages, calls = seen(template, messages, findings, where)
        answers = [
            message.content + calls.get(n, "") for n, message in enumerate(messages) if message.role == "assistant"
        ]
        if not any(text.strip() for text in answers):
            findings.note("empty", where)
            continue
        if not all(text.strip() for text in answers):
            findings.note("silent", where)
        last_only = encoder.config.answers == "last"
        ids, trained = encode_conversation(template, messages, last_only=last_only, where=where)
        other = None
        if encoder.other_chat is not None:
            other_template = encoder.other_chat.with_tools(conversation.tools)
            other = encode_conversation(other_template, messages, last_only=last_only, where=where)
        note_ends(findings, ids, trained, ends, where)
        last = max((index for index, is_trained in enumerate(trained) if is_trained), default=0)
        ids, trained = ids[: last + 1], trained[: last + 1]  # drop template text after the last answer
        if len(ids) > encoder.limit + 1:
            if encoder.too_long(where, len(ids)):
                continue
            ids, trained = ids[: encoder.limit + 1], trained[: encoder.limit + 1]
        soft = None
        if encoder.soft is not None and (logprobs := checked_logprobs(conversation.logprobs)):
            soft = encoder.soft.make(ids, trained, logprobs)
        asked = [
            message.content + calls.get(n, "") for n, message in enumerate(messages) if message.role != "assistant"
        ]
        key = "\0".join([*asked, *map(repr, conversation.tools)])
        yield from trained_row(
            encoder, ExampleRow(where, ids, key, "\0".join(answers), trained, other=other, soft=soft)
        )


def seen(
    template: ChatTemplate, messages: Sequence[Message], findings: Findings, where: str
) -> tuple[list[Message], dict[int, str]]:
    """Count what the chat template leaves out; return the messages, and by index the rendered fields of some as text.

    An answer without text or rendered fields is not trained: it would teach a model to say nothing.
    """
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    try:
        left_out = template.left_out(messages[: last + 1])
    except UsageError:  # encoding the conversation says it with the place
        left_out = []
    for index, name in left_out:
        if name == "content":
            findings.note("unseen", f"{where}, `{messages[index].role}`")
        else:
            findings.note("unread", f"{where}, `{name}`")
    fields = {
        index: repr([field for field in message.fields if (index, field[0]) not in left_out])
        for index, message in enumerate(messages)
        if any((index, name) not in left_out for name, _ in message.fields)
    }
    return [
        message._replace(is_trained=message.is_trained and bool(message.content.strip() or index in fields))
        for index, message in enumerate(messages)
    ], fields


def note_ends(findings: Findings, ids: Sequence[int], trained: Sequence[bool], ends: set[int], where: str) -> None:
    """Count answers without an end-of-turn token, which cannot teach a model to stop, and those with two."""
    closing = [
        index for index, is_trained in enumerate(trained) if is_trained and not (trained[index + 1 :] or [False])[0]
    ]
    if any(ids[index] not in ends for index in closing):
        findings.note("endless", where)
    if any(index and trained[index - 1] and {ids[index], ids[index - 1]} <= ends for index in closing):
        findings.note("ended_twice", where)


def trained_row(encoder: Encoder, row: ExampleRow) -> Iterator[ExampleRow]:
    """Yield a row, or count it as untrained; the first token of a row is never predicted."""
    if any(row.trained[1:]):
        yield row
    else:
        encoder.findings.note("untrained", row.where)


def first_answer(example: Example) -> str:
    """Return the target text, the first if there are several."""
    if isinstance(example.target, list):
        return str(example.target[0]) if example.target else ""
    return str(example.target)
