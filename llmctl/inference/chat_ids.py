"""Token ids of conversations: prompts for inference, and full conversations with the ids that are trained.

Each part of a rendered conversation is encoded separately, so that training sees the same ids before an answer as
`generate` and `chat` do. They equal those of transformers for the same template, except where an answer begins with
white space that the tokenizer would merge with the template's own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llmctl.data.conversations import Message
from llmctl.errors import UsageError
from llmctl.inference.chat_template import ChatTemplate, unescaped
from llmctl.tokenizer.base import SpecialToken


class Encoded(NamedTuple):
    """Ids of a conversation, and which of them are trained: the assistant's text and its end-of-turn token."""

    ids: list[int]
    is_trained: list[bool]


def encode_conversation(
    template: ChatTemplate, messages: Sequence[Message], *, last_only: bool = False, where: str = ""
) -> Encoded:
    """Encode a conversation and mark the trained ids: every answer with its end-of-turn token, or the last one.

    Messages after the last answer are dropped. `where` is the prefix of error messages.

    Raises: UsageError for a conversation that the template rejects, or whose answers cannot be located.
    """
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    try:
        if not answers:
            roles = ", ".join(sorted({message.role for message in messages})) or "none"
            raise UsageError(
                f"the conversation has no assistant message (roles: {roles})", "add a message with the role `assistant`"
            )
        parts = template.answer_parts(template.escaped(messages[: answers[-1] + 1]), last_only=last_only)
        if not template.shape[1]:
            raise UsageError(
                "the chat template does not end answers with a special token, so a model cannot learn to stop",
                "end each answer with {{ eos_token }} in the template",
            )
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where else str(error), error.hint) from error
    encoded = list(encode_parts(template, [part.text for part in parts]))
    flags = [[part.is_answer] * len(ids) for part, ids in zip(parts, encoded, strict=True)]
    return Encoded([index for ids in encoded for index in ids], [flag for row in flags for flag in row])


def encode_prompt_chat(template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to the start of the next answer.

    Raises: UsageError for a conversation that the template rejects.
    """
    parts = template.prompt_parts(template.escaped(messages))
    return [index for ids in encode_parts(template, [part.text for part in parts]) for index in ids]


def encode_parts(template: ChatTemplate, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of consecutive texts; special tokens get their ids, escape marks are removed."""
    tokenizer = template.tokenizer
    last: SpecialToken | None = None  # the special token right before, if any
    is_first = True
    for text in texts:
        ids: list[int] = []
        for piece in split(template, text):
            if isinstance(piece, SpecialToken):
                ids.append(piece.token_id)
                last, is_first = piece, False
            elif literal := unescaped(piece.lstrip() if last and last.strips_right else piece):
                ids += (
                    tokenizer.encode(literal) if is_first else tokenizer.encode_next(literal, after_special=bool(last))
                )
                last, is_first = None, False
        yield ids


def split(template: ChatTemplate, text: str) -> Iterator[str | SpecialToken]:
    """Yield literal text and special tokens alternately."""
    start = 0
    for match in template.special_pattern.finditer(text):
        token = template.specials[match[0]]
        literal = text[start : match.start()]
        yield literal.rstrip() if token.strips_left else literal
        yield token
        start = match.end()
    yield text[start:]


def end_of_turn_ids(template: ChatTemplate) -> set[int]:
    """Return the ids that end an answer: the end-of-text token and the end-of-turn token of the template."""
    end = template.shape[1]
    ids = {template.tokenizer.eos_id, template.specials[end].token_id if end else None}
    return {index for index in ids if index is not None}
