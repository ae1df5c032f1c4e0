"""Read conversations from jsonl, json, csv, tsv and parquet files in any of the common schemas.

Knows the schemas of published chat and instruction datasets, but no templates, tokenizers or models. It does not guess:
a row that matches two schemas, or none, is an error. Text is never changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llmctl.data import sources, tables
from llmctl.errors import UsageError
from llmctl.tables.tasks import fitting_tasks, or_task

ROLES: Mapping[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "model", "chatgpt", "ai"),
    "tool": ("tool", "function", "observation"),
}
"""Each role and its names in published datasets."""


class Message(NamedTuple):
    """One message of a conversation; `role` is one of `ROLES`.

    fields: what else the row says of it, such as `tool_calls`, for the chat template. is_trained: false for an answer with
    `"weight": 0`.
    """

    role: str
    content: str
    fields: tuple[tuple[str, Any], ...] = ()
    is_trained: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the message as chat templates and `read_conversations` take it."""
        return {"role": self.role, "content": self.content, **dict(self.fields)}


class Conversation(NamedTuple):
    """The messages of one row and the tools they may call; `where` is its file and line, for error messages.

    logprobs: the log-probabilities of the last answer, as a server gave them.
    """

    where: str
    messages: list[Message]
    tools: tuple[Any, ...] = ()
    logprobs: Any = None


Row = Mapping[str, Any]
Reader = Callable[[Row, str], Iterator[Conversation]]


def read_conversations(paths: Sequence[str], *, messages_key: str = "") -> Iterator[Conversation]:
    """Yield the conversations of files, folders, globs and `-` (JSON lines on stdin), in order.

    `messages_key` is the field with the list of messages. If empty, the schema is detected row by row: `messages` or
    `conversations`, `prompt` with `completion`, `instruction` with `output` (Alpaca) or `instances` (self-instruct),
    `question` with `answer`. A field `system` becomes the first message.

    Raises: NotFoundError for a missing file; UsageError naming file, line and field of anything missing, of the wrong
        type or ambiguous.
    """
    is_empty = True
    for name in sources.expand(paths):
        for where, row in tables.read_rows(name):
            for conversation in _read_row(row, where, messages_key):
                is_empty = False
                yield conversation
    if is_empty:
        listed = ", ".join(f"`{path}`" for path in paths) or "an empty list of files"
        raise UsageError(f"there are no conversations in {listed}", KNOWN_SHAPES)


def _read_row(row: Any, where: str, messages_key: str) -> Iterator[Conversation]:
    if isinstance(row, list):  # a JSON line that is a bare list of messages
        row = {messages_key or "messages": row}
    if not isinstance(row, dict):
        raise UsageError(f"{where} is of type {type(row).__name__}, not a conversation", KNOWN_SHAPES)
    if messages_key:
        _require(row, (messages_key,), where)
        conversations: Iterator[Conversation] = iter([_listed(row, messages_key, where)])
    else:
        conversations = SHAPES[_shape(row, where)](row, where)
    for conversation in conversations:
        if not any(message.role == "assistant" for message in conversation.messages):
            raise UsageError(
                f"{conversation.where} has no assistant message", "a conversation needs at least one answer"
            )
        yield conversation._replace(tools=tools_of(row, where), logprobs=row.get("logprobs"))


def _shape(row: Row, where: str) -> tuple[str, ...]:
    """Return the schema of a row, identified by its fields."""
    matching = [fields for fields in SHAPES if all(field in row for field in fields)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        listed = " or ".join(field_names(fields) for fields in matching)
        raise UsageError(
            f"{where} matches more than one schema: {listed}",
            "remove the fields that are not meant, or name the one with the messages",
        )
    hint = or_task(fitting_tasks(row)) + KNOWN_SHAPES
    partial = [fields for fields in SHAPES if fields[0] in row]
    if partial:
        missing = " or ".join(f"`{fields[1]}`" for fields in partial)
        raise UsageError(
            f"{where} has `{partial[0][0]}` but no {missing}; it has {field_names(row)}",
            or_task(fitting_tasks(row)) + KNOWN_SHAPES,
        )
    hint = or_task(fitting_tasks(row)) + KNOWN_SHAPES
    raise UsageError(f"{where} matches no known schema; it has {field_names(row) or 'no fields'}", hint)


def field_names(names: Any) -> str:
    """Return the names of fields as an error message lists them."""
    return ", ".join(f"`{name}`" for name in names)


def _require(row: Row, fields: Sequence[str], where: str) -> None:
    for field in fields:
        if field not in row:
            raise UsageError(f"{where} has no field `{field}`; it has {field_names(row)}", "name another field")


# --- schemas ---------------------------------------------------------------------------------------------------------


def _messages(row: Row, where: str) -> Iterator[Conversation]:
    yield _listed(row, "messages", where)


def _conversations(row: Row, where: str) -> Iterator[Conversation]:
    yield _listed(row, "conversations", where)


def _completion(row: Row, where: str) -> Iterator[Conversation]:
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            messages += message_list(row[key], key, where)
        else:
            messages.append(Message(role, text_of(row[key], f"`{key}`", where)))
    yield Conversation(where, [*system_of(row, where, messages), *messages])


def _alpaca(row: Row, where: str) -> Iterator[Conversation]:
    answer = Message("assistant", text_of(row["output"], "`output`", where))
    yield Conversation(where, [*system_of(row, where), *history_of(row, where), task_of(row, row, where), answer])


def _instances(row: Row, where: str) -> Iterator[Conversation]:
    instances = row["instances"]
    if not isinstance(instances, list) or not instances:
        raise UsageError(
            f"{where}: `instances` is {kind_of(instances)}, not a list of inputs and outputs", KNOWN_SHAPES
        )
    for number, instance in enumerate(instances, start=1):
        inner = f"{where} instance {number}"
        if not isinstance(instance, dict) or "output" not in instance:
            raise UsageError(f"{inner} has no `output`", "an instance is an object with `input` and `output`")
        answer = Message("assistant", text_of(instance["output"], "`output`", inner))
        yield Conversation(inner, [*system_of(row, inner), task_of(row, instance, inner), answer])


def _question(row: Row, where: str) -> Iterator[Conversation]:
    question = Message("user", text_of(row["question"], "`question`", where))
    answer = Message("assistant", text_of(row["answer"], "`answer`", where))
    yield Conversation(where, [*system_of(row, where), question, answer])


SHAPES: Mapping[tuple[str, ...], Reader] = {
    ("messages",): _messages,
    ("conversations",): _conversations,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _alpaca,
    ("instruction", "instances"): _instances,
    ("question", "answer"): _question,
}
"""The fields that identify each schema, and its reader."""
KNOWN_SHAPES = "known fields: " + "; ".join(" with ".join(f"`{name}`" for name in fields) for fields in SHAPES)


# --- fields ----------------------------------------------------------------------------------------------------------


def _listed(row: Row, key: str, where: str) -> Conversation:
    """Read a list of messages from a field; in a csv or tsv file it is a JSON string."""
    messages = message_list(parsed(row[key], key, where), key, where)
    return Conversation(where, [*system_of(row, where, messages), *messages])


def parsed(value: Any, key: str, where: str) -> Any:
    """Return a value, or what it is the JSON text of."""
    if not isinstance(value, str):
        return value
    try:
        return tables.JSON.decode(value)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: `{key}` is text but not a JSON list: {error}", "write it as a JSON list") from error


def tools_of(row: Row, where: str) -> tuple[Any, ...]:
    """Return the tools of a row: a list, or one as JSON text; none if there is no such field."""
    tools = parsed(row.get("tools") or [], "tools", where)
    if not isinstance(tools, list):
        raise UsageError(f"{where}: `tools` is {kind_of(tools)}, not a list", "list the tools, or remove the field")
    return tuple(map(_whole, tools))


def message_list(value: Any, key: str, where: str) -> list[Message]:
    """Return the messages of a list; `where` and `key` name it in errors.

    Raises: UsageError.
    """
    if not isinstance(value, list):
        raise UsageError(
            f"{where}: `{key}` is {kind_of(value)}, not a list of messages", "a message has `role` and `content`"
        )
    if not value:
        raise UsageError(f"{where}: `{key}` is an empty list", "a conversation needs a question and an answer")
    return [_message(item, f"{where}: message {number} of `{key}`") for number, item in enumerate(value, start=1)]


def _message(item: Any, where: str) -> Message:
    """Read a message: `role` and `content`, or ShareGPT's `from` and `value`."""
    if not isinstance(item, dict):
        raise UsageError(f"{where} is {kind_of(item)}, not an object", "a message has `role` and `content`")
    # Some datasets have `from` in addition to `role`, with another meaning.
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    # A message that only calls tools has no text.
    if item.get("tool_calls") and item.get(content_key) is None:
        item = {**item, content_key: ""}
    for key in (role_key, content_key):
        if key not in item:
            raise UsageError(
                f"{where} has no `{key}`; it has {field_names(item) or 'no fields'}",
                "a message has `role` and `content`, or `from` and `value`",
            )
    content = text_of(item[content_key], f"`{content_key}`", where)
    # Tables fill the fields that other messages have with null.
    read = (role_key, content_key, "weight")
    more = tuple((key, _whole(value)) for key, value in item.items() if key not in read and value not in (None, [], {}))
    return Message(_role(item[role_key], role_key, where), content, more, _is_trained(item.get("weight"), where))


def _is_trained(weight: Any, where: str) -> bool:
    """Tell whether a message's `weight`, 0 or 1, lets it be trained."""
    if weight not in (None, 0, 1):
        raise UsageError(f"{where}: `weight` is `{weight!s:.40}`, it must be 0 or 1", "0 leaves the answer untrained")
    return weight is None or bool(weight)


def _role(value: Any, key: str, where: str) -> str:
    for role, names in ROLES.items():
        if isinstance(value, str) and value.lower() in names:
            return role
    known = ", ".join(f"`{name}`" for names in ROLES.values() for name in names)
    raise UsageError(f"{where} has the unknown {key} `{str(value)[:40]}`", f"use one of {known}")


def text_of(value: Any, field: str, where: str) -> str:
    """Return a value that must be text.

    Raises: UsageError.
    """
    if not isinstance(value, str):
        raise UsageError(f"{where}: {field} is {kind_of(value)}, not text", "only text is supported")
    return tables.whole_characters(value)


def _whole(value: Any) -> Any:
    """Return a value of JSON whose strings can be encoded."""
    if isinstance(value, str):
        return tables.whole_characters(value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return list(map(_whole, value)) if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """Return the type of a JSON value as an error message names it."""
    return "null" if value is None else type(value).__name__


def system_of(row: Row, where: str, messages: Sequence[Message] = ()) -> list[Message]:
    """Return the system message of a field `system`, or none."""
    value = row.get("system")
    if value is None or value == "":
        return []
    if messages and messages[0].role == "system":
        raise UsageError(f"{where} has both a field `system` and a system message", "remove one of them")
    return [Message("system", text_of(value, "`system`", where))]


def history_of(row: Row, where: str) -> list[Message]:
    """Return an Alpaca row's earlier turns: LLaMA-Factory's list of [question, answer]."""
    turns = row.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise UsageError(f"{where}: `history` is not a list of [question, answer]", "correct or remove it")
    pairs = [
        (Message("user", text_of(a, "`history`", where)), Message("assistant", text_of(b, "`history`", where)))
        for a, b in turns
    ]
    return [message for pair in pairs for message in pair]


def task_of(row: Row, inputs: Row, where: str) -> Message:
    """Return an instruction as a user message, followed by its input, if any, after a blank line."""
    instruction = text_of(row["instruction"], "`instruction`", where)
    task_input = inputs.get("input")
    if task_input is None or task_input == "":
        return Message("user", instruction)
    return Message("user", f"{instruction}\n\n{text_of(task_input, '`input`', where)}")
