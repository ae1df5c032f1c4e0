"""Prompts for a model that answers them: conversations without their last answers, questions, or beginnings of texts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llmctl.data import sources, tables
from llmctl.data.conversations import Message, message_list, parsed, system_of, task_of, text_of
from llmctl.data.text_files import numbered_lines
from llmctl.errors import UsageError

FIELDS = "a row has `messages`, `conversations`, `prompt`, `question`, `instruction` or `text`"


class Asked(NamedTuple):
    """A prompt: the messages of a conversation, or the beginning of a text (`messages` is empty)."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""


def read_prompts(paths: Sequence[str]) -> Iterator[Asked]:
    """Yield the prompts of files: rows of tables, lines of other files.

    Raises: NotFoundError; UsageError naming file, line and field, also for files without any.
    """
    is_empty = True
    for name in sources.expand(paths):
        is_rows = tables.is_table(name) or name == "-"
        for asked in rows_of(name) if is_rows else lines_of(name):
            if asked.text.strip() or any(message.content.strip() for message in asked.messages):
                is_empty = False
                yield asked
    if is_empty:
        raise UsageError(f"there are no prompts in {', '.join(f'`{path}`' for path in paths) or 'no files'}", FIELDS)


def rows_of(name: str) -> Iterator[Asked]:
    """Yield the prompts of a table."""
    for where, row in tables.read_rows(name):
        yield from_row(row, where)


def lines_of(name: str) -> Iterator[Asked]:
    """Yield the lines of a text file as questions."""
    for number, line in numbered_lines(name):
        yield Asked(f"{name}:{number}", (Message("user", line.strip()),))


def from_row(row: Any, where: str) -> Asked:
    """Return the prompt of a row."""
    if isinstance(row, list):
        row = {"messages": row}
    if isinstance(row, str):
        return Asked(where, (Message("user", row),))
    if not isinstance(row, Mapping):
        raise UsageError(f"{where} is of type {type(row).__name__}, not a prompt", FIELDS)
    for key in ("messages", "conversations"):
        if key in row:
            messages = message_list(parsed(row[key], key, where), key, where)
            return asked_of([*system_of(row, where, messages), *messages], where)
    if "prompt" in row:
        value = row["prompt"]
        messages = message_list(value, "prompt", where) if isinstance(value, list) else [user(value, "prompt", where)]
        return asked_of([*system_of(row, where, messages), *messages], where)
    if "instruction" in row:
        return asked_of([*system_of(row, where), task_of(row, row, where)], where)
    if "question" in row:
        return asked_of([*system_of(row, where), user(row["question"], "question", where)], where)
    if "text" in row:
        return Asked(where, (), text_of(row["text"], "`text`", where))
    raise UsageError(f"{where} has no prompt; it has {', '.join(f'`{name}`' for name in row) or 'no fields'}", FIELDS)


def user(value: Any, key: str, where: str) -> Message:
    """Return a user's message."""
    return Message("user", text_of(value, f"`{key}`", where))


def asked_of(messages: list[Message], where: str) -> Asked:
    """Return a conversation without what follows its last question."""
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not any(message.role == "user" for message in messages):
        raise UsageError(f"{where} has no message of a user", FIELDS)
    return Asked(where, tuple(messages))
