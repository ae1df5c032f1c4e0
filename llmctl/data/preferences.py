"""Read preferences: prompts with a chosen and a rejected answer, or with one answer that is desirable or not.

Knows the schemas of published preference datasets, but no templates, tokenizers or models.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from llmctl.data import sources, tables
from llmctl.data.conversations import (
    Message,
    field_names,
    history_of,
    kind_of,
    message_list,
    system_of,
    task_of,
    text_of,
    tools_of,
)
from llmctl.errors import UsageError

CHOSEN, REJECTED = "chosen", "rejected"
KNOWN_SHAPES = (
    "known fields: `chosen` and `rejected`, which are texts after a `prompt`, `question` or `instruction`, or lists of messages; "
    "or `prompt`, `completion` and `label`"
)
LABELS = {"true": True, "false": False, "1": True, "0": False}
TURN = re.compile(r"\n\n(Human|Assistant): ?")
"""Begins a turn in transcripts such as those of Anthropic's hh-rlhf."""


class Preference(NamedTuple):
    """A prompt, one or two answers to it, and whether the first is desirable; the second is the opposite."""

    where: str
    prompt: list[Message]
    answers: list[list[Message]]
    is_desirable: bool = True
    tools: tuple[Any, ...] = ()


Row = Mapping[str, Any]


def read_preferences(paths: Sequence[str]) -> Iterator[Preference]:
    """Yield the preferences of files, folders, globs and `-` (JSON lines on stdin), in order.

    `chosen` and `rejected` are answers to a `prompt` (text or messages), `question`, `instruction` (with `input`) or
    `conversations`, or whole conversations with a common beginning, as lists of messages or as transcripts with `Human:` and
    `Assistant:`. Single answers are `prompt`, `completion` and a `label` that is true or false. A field `system` becomes the
    first message.

    Raises: NotFoundError for a missing file; UsageError naming file, line and field of anything missing or of the wrong type.
    """
    is_empty = True
    for name in sources.expand(paths):
        for where, row in tables.read_rows(name):
            is_empty = False
            yield preference_of(row, where)
    if is_empty:
        listed = ", ".join(f"`{path}`" for path in paths)
        raise UsageError(f"there are no preferences in {listed}", KNOWN_SHAPES)


def preference_of(row: Any, where: str) -> Preference:
    """Return the preference of a row.

    Raises: UsageError.
    """
    if not isinstance(row, dict):
        raise UsageError(f"{where} is of type {kind_of(row)}, not a preference", KNOWN_SHAPES)
    if CHOSEN in row and REJECTED in row:
        return pair_of(row, where)
    if "completion" in row and "label" in row:
        answer, label = answer_of(row["completion"], "completion", where), LABELS.get(str(row["label"]).lower())
        if label is None:
            raise UsageError(f"{where}: `label` is `{row['label']!s:.40}`, it must be true or false", KNOWN_SHAPES)
        prompt = prompt_of(row, where)
        if not prompt:
            raise UsageError(f"{where} has no `prompt`; it has {field_names(row)}", KNOWN_SHAPES)
        return Preference(where, prompt, [answer], label, tools_of(row, where))
    other = next((name for name in (CHOSEN, REJECTED) if name in row), "")
    what = f"has `{other}` but not both answers" if other else "is no preference"
    raise UsageError(f"{where} {what}; it has {field_names(row) or 'no fields'}", KNOWN_SHAPES)


def pair_of(row: Row, where: str) -> Preference:
    """Return the preference of a row with `chosen` and `rejected`."""
    chosen, rejected = (whole(row[name], name, where) for name in (CHOSEN, REJECTED))
    if chosen is None or rejected is None:
        prompt = prompt_of(row, where)
        if not prompt:
            raise UsageError(f"{where} has no prompt for its answers; it has {field_names(row)}", KNOWN_SHAPES)
        answers = [answer_of(row[name], name, where) for name in (CHOSEN, REJECTED)]
        return Preference(where, prompt, answers, tools=tools_of(row, where))
    # Whole conversations: what they have in common is the prompt, up to the first of the last answers.
    n_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    n_common = min(n_common, len(chosen) - 1, len(rejected) - 1)
    while n_common and chosen[n_common - 1].role == "assistant":
        n_common -= 1
    answers = [chosen[n_common:], rejected[n_common:]]
    for name, answer in zip((CHOSEN, REJECTED), answers, strict=True):
        if not n_common or [message.role for message in answer] != ["assistant"]:
            raise UsageError(
                f"{where}: `{name}` does not end with one answer to a prompt that both conversations begin with",
                "the conversations may differ in the last message only",
            )
    prompt = [*system_of(row, where, chosen), *chosen[:n_common]]
    return Preference(where, prompt, answers, tools=tools_of(row, where))


def whole(value: Any, name: str, where: str) -> list[Message] | None:
    """Return the messages of a value that is a conversation from its first message on; None for an answer alone."""
    if isinstance(value, str) and value.startswith(("\n\nHuman:", "Human:")):
        _, *parts = TURN.split(value if value.startswith("\n\n") else f"\n\n{value}")
        roles = {"Human": "user", "Assistant": "assistant"}
        return [Message(roles[role], text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True)]
    if not isinstance(value, list):
        return None
    messages = message_list(value, name, where)
    return messages if messages[0].role != "assistant" else None


def answer_of(value: Any, name: str, where: str) -> list[Message]:
    """Return the message of an answer: text, a message, or a list of one.

    Raises: UsageError.
    """
    if isinstance(value, str):
        return [Message("assistant", text_of(value, f"`{name}`", where))]
    messages = message_list([value] if isinstance(value, dict) else value, name, where)
    if [message.role for message in messages] != ["assistant"]:
        roles = ", ".join(message.role for message in messages)
        raise UsageError(f"{where}: `{name}` must be one answer, its messages are of: {roles}", KNOWN_SHAPES)
    return messages


def prompt_of(row: Row, where: str) -> list[Message]:
    """Return the messages before the answers; none if the row has no field for them."""
    name = next((name for name in ("prompt", "question", "conversations", "messages") if name in row), "")
    if name:
        value = row[name]
        listed = isinstance(value, list)
        messages = message_list(value, name, where) if listed else [Message("user", text_of(value, f"`{name}`", where))]
        return [*system_of(row, where, messages), *messages]
    if "instruction" in row:
        return [*system_of(row, where), *history_of(row, where), task_of(row, row, where)]
    return []
