"""Encode preferences: the prompt with each of its answers, one after the other in a row."""

from collections.abc import Iterable, Iterator

from llmctl.config import FinetuneConfig
from llmctl.data.conversations import Message
from llmctl.data.preferences import Preference
from llmctl.errors import UsageError
from llmctl.inference.chat_ids import encode_conversation, end_of_turn_ids
from llmctl.preparing.example_rows import Encoder, ExampleRow, note_ends
from llmctl.tables.preferences import PREFERENCES


def preference_rows(encoder: Encoder, preferences: Iterable[Preference]) -> Iterator[ExampleRow]:
    """Yield the encoded answers of each preference, the chosen one first, with the last message of each trained.

    `values` has 1 if the first answer is desirable, else 0. A long answer is truncated at its end.
    Raises: UsageError for a single answer if the loss compares two.
    """
    assert encoder.chat is not None
    assert isinstance(encoder.config, FinetuneConfig)
    loss = encoder.config.preference.loss
    is_paired = PREFERENCES[loss].is_paired
    findings, limit, ends = encoder.findings, encoder.limit + 1, end_of_turn_ids(encoder.chat)
    for preference in preferences:
        where, prompt = preference.where, list(preference.prompt)
        if encoder.config.system and prompt[0].role != "system":
            prompt.insert(0, Message("system", encoder.config.system))
        template = encoder.chat.with_tools(preference.tools)
        texts = [answer[0].content for answer in preference.answers]
        if is_paired and len(texts) == 1:
            raise UsageError(
                f"{where} has one answer, but `preference.loss` is {loss}, which compares two",
                "--loss kto, or data with `chosen` and `rejected`",
            )
        if not all(text.strip() or answer[0].fields for text, answer in zip(texts, preference.answers, strict=True)):
            findings.note("empty", where)
            continue
        if len(texts) == 2 and preference.answers[0] == preference.answers[1]:
            findings.note("equal", where)
            continue
        encoded = [
            encode_conversation(template, [*prompt, *answer], last_only=True, where=where)
            for answer in preference.answers
        ]
        sides = []
        for ids, trained in encoded:
            note_ends(findings, ids, trained, ends, where)
            last = max((index for index, is_trained in enumerate(trained) if is_trained), default=0)
            sides.append((ids[: last + 1], trained[: last + 1]))
        longest = max(len(ids) for ids, _ in sides)
        if longest > limit and encoder.too_long(where, longest):
            continue
        sides = [(ids[:limit], trained[:limit]) for ids, trained in sides]
        if not all(any(trained[1:]) for _, trained in sides):
            findings.note("untrained", where)
            continue
        yield ExampleRow(
            where,
            [index for ids, _ in sides for index in ids],
            "\0".join(message.content for message in prompt),
            "\0".join(texts),
            [flag for _, trained in sides for flag in trained],
            values=(float(preference.is_desirable),),
            first_length=len(sides[0][0]),
        )
