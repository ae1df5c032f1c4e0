"""Conversations as token ids: what a chat model sees at inference, and which ids it is trained to say.

Each part of a rendered conversation is encoded on its own, so that the ids before an answer are those that `generate`
and `chat` feed. They are transformers' ids for the same template, but where an answer begins with white space that
a tokenizer would join to the template's own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llmctl.data.conversations import Message
from llmctl.errors import UsageError
from llmctl.inference.chat_template import ChatTemplate, unbroken
from llmctl.tokenizer.base import SpecialToken


class Encoded(NamedTuple):
    """A conversation's ids, and which of them are the assistant's own words and their end."""

    ids: list[int]
    is_trained: list[bool]


def encode_conversation(
    template: ChatTemplate, messages: Sequence[Message], *, last_only: bool = False, where: str = ""
) -> Encoded:
    """Return a conversation's ids, and which of them are trained: every answer with the token that ends its turn.

    What is said after the last answer is left out. `where` begins every error's message.

    Raises: UsageError for a conversation that the template does not take, or whose answers cannot be told from it.
    """
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    try:
        if not places:
            raise UsageError("the conversation has no message of the assistant")
        parts = template.answer_parts(template.broken(messages[: places[-1] + 1]), last_only=last_only)
        if not template.shape[1]:
            raise UsageError(
                "the chat template ends an answer with no special token of the tokenizer, so no model can learn to stop",
                "end an answer with {{ eos_token }} in the template",
            )
    except UsageError as error:
        raise UsageError(f"{where}: {error}" if where else str(error), error.hint) from error
    encoded = list(encode_parts(template, [part.text for part in parts]))
    flags = [[part.is_answer] * len(ids) for part, ids in zip(parts, encoded, strict=True)]
    return Encoded([index for ids in encoded for index in ids], [flag for row in flags for flag in row])


def encode_prompt_chat(template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to where the assistant is to speak.

    Raises: UsageError for a conversation that the template does not take.
    """
    parts = template.prompt_parts(template.broken(messages))
    return [index for ids in encode_parts(template, [part.text for part in parts]) for index in ids]


def encode_parts(template: ChatTemplate, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of texts that follow each other; special tokens in them become theirs, marks are taken out."""
    tokenizer = template.tokenizer
    last: SpecialToken | None = None  # what stands right before
    is_first = True
    for text in texts:
        ids: list[int] = []
        for piece in split(template, text):
            if isinstance(piece, SpecialToken):
                ids.append(piece.token_id)
                last, is_first = piece, False
            elif literal := unbroken(piece.lstrip() if last and last.strips_right else piece):
                ids += (
                    tokenizer.encode(literal) if is_first else tokenizer.encode_next(literal, after_special=bool(last))
                )
                last, is_first = None, False
        yield ids


def split(template: ChatTemplate, text: str) -> Iterator[str | SpecialToken]:
    """Yield literal texts and special tokens in turn."""
    place = 0
    for found in template.special_pattern.finditer(text):
        token = template.specials[found[0]]
        literal = text[place : found.start()]
        yield literal.rstrip() if token.strips_left else literal
        yield token
        place = found.end()
    yield text[place:]


def end_of_turn_ids(template: ChatTemplate) -> set[int]:
    """Return the ids that end an answer: the tokenizer's end of text, and what the template ends a turn with."""
    end = template.shape[1]
    ids = {template.tokenizer.eos_id, template.specials[end].token_id if end else None}
    return {index for index in ids if index is not None}
