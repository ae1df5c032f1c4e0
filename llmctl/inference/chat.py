"""A conversation with a model: its messages, the part that fits in the context, and the next answer.

A decoder sees the conversation through its chat template; an encoder-decoder sees only the latest message.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig
from llmctl.data.chat_text import NEXT_USER
from llmctl.data.conversations import Message
from llmctl.errors import UsageError
from llmctl.inference import settings
from llmctl.inference.chat_ids import encode_prompt_chat, end_of_turn_ids
from llmctl.inference.chat_template import ChatTemplate, template_of
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.generate import Completion, Prompt, generate
from llmctl.inference.prefix import Prefix

ROOM_FRAC = 4
"""Reserve at most 1 / ROOM_FRAC of the context for the answer (less if max_tokens is smaller)."""

SYSTEM_NOTE = "the chat template leaves out system messages: the model does not see this one"
PLAIN_NOTE = "the model has no chat template; using a plain one that it may not have been trained on"
SOURCE_NOTE = "an encoder-decoder is not trained on chat: it reads each message alone, as a source text, and answers as in its task"


@dataclass(frozen=True)
class Turn:
    """Renders single messages for a decoder and cleans its answers, for `generate --chat`."""

    template: ChatTemplate
    system: str = ""

    def encode(self, text: str) -> list[int]:
        """Return the prompt ids of a message, up to the start of the answer."""
        return encode_prompt_chat(self.template, with_system(self.system, [Message("user", text)]))

    def config(self, config: GenerateConfig) -> GenerateConfig:
        """Return the settings, with the next user turn as a stop string if the model has no chat template."""
        return replace(config, stop=(*config.stop, NEXT_USER)) if self.template.is_plain else config

    @property
    def ends(self) -> set[int]:
        """Token ids that end an answer."""
        return end_of_turn_ids(self.template)

    def lead(self) -> "Lead":
        """Return a filter that removes the template's leading white space from a streamed answer."""
        return Lead(self.template.shape[0])

    def clean(self, completion: Completion) -> Completion:
        """Return a completion without the template's leading white space."""
        return replace(completion, text=completion.text.removeprefix(self.template.shape[0]))


@dataclass(frozen=True)
class Answer:
    """An answer; finish: as in `Completion`, or `interrupted`; is_cut: the oldest turns were dropped for the first time."""

    text: str
    finish: str
    is_cut: bool


class Chat:
    """A conversation. `messages`: all turns without the system prompt; `start`: the first turn the model still sees.

    Raises: UsageError for invalid settings or a model without a tokenizer.
    """

    def __init__(self, loaded: Loaded, config: GenerateConfig, system: str = "") -> None:
        settings.check(config)
        if loaded.tokenizer is None:
            raise UsageError(f"`{loaded.artifact.path}` has no tokenizer", "`llmctl generate --ids` takes token ids")
        self.loaded, self.messages, self.start, self.n_asked = loaded, list[Message](), 0, 0
        self.template = template_of(loaded) if loaded.model.config.family == "decoder" else None
        self.turn = Turn(self.template) if self.template else None
        self.config = self.turn.config(config) if self.turn else config
        self.prefix = Prefix()  # each prompt starts with the whole conversation before it
        self.system = ""
        self.set_system(system)

    def set_system(self, system: str) -> None:
        """Set the system prompt; an empty text removes it.

        Raises: UsageError for an encoder-decoder.
        """
        if system and self.template is None:
            raise UsageError(
                f"`{self.loaded.artifact.path}` is an encoder-decoder and has no system prompt, got `{system[:80]}`",
                "put it into the message",
            )
        self.system = system

    def reset(self) -> None:
        """Clear the conversation, keep the system prompt."""
        self.messages, self.start = [], 0

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """Return the conversation in the format that `read_conversations` reads."""
        return {"messages": [message.to_dict() for message in with_system(self.system, self.messages)]}

    def ask(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Send a message and return the answer; `on_text` gets the answer as it is generated.

        An interrupt (Ctrl-C) ends the answer and keeps its text; without any text the message is discarded.
        Raises: UsageError if the message does not fit or the template rejects it; the message is discarded.
        """
        messages = [*self.messages, Message("user", text)]
        ids, start = self._fit(messages)
        lead, ends = (self.turn.lead(), self.turn.ends) if self.turn else (Lead(""), set[int]())
        pieces: list[str] = []

        def on_piece(_: int, new: str) -> None:
            if stripped := lead.cut(new):
                pieces.append(stripped)
                on_text(stripped)

        prompt = Prompt(self.n_asked, ids, text)
        try:
            finish = next(generate(self.loaded, [prompt], self.config, on_piece, ends=ends, prefix=self.prefix)).finish
        except KeyboardInterrupt:
            finish = "interrupted"
        answer = "".join(pieces)
        if answer or finish != "interrupted":
            is_cut, self.start, self.n_asked = start > 0 == self.start, start, self.n_asked + 1
            self.messages = [*messages, Message("assistant", answer)]
            return Answer(answer, finish, is_cut)
        return Answer("", finish, is_cut=False)

    def _fit(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Return the prompt ids and the index of their first message; drops the oldest turns to fit the context."""
        if self.template is None:
            return encode_prompt(self.loaded, messages[-1].content), len(messages) - 1
        limit = self.loaded.model.config.max_positions
        room = min(self.config.max_tokens, limit // ROOM_FRAC)
        starts = [index for index, message in enumerate(messages) if message.role == "user" and index >= self.start]
        for start in starts:
            ids = encode_prompt_chat(self.template, with_system(self.system, messages[start:]))
            if len(ids) + room <= limit:
                return ids, start
        if len(ids) >= limit:  # a single long message may use the room reserved for the answer, but must leave some
            raise UsageError(
                f"the message has {len(ids)} tokens with its template, the model's context is {limit}",
                "shorten the message",
            )
        return ids, starts[-1]


class Lead:
    """Removes the leading white space of a template from a text that arrives in pieces."""

    def __init__(self, lead: str) -> None:
        self.lead = lead

    def cut(self, new: str) -> str:
        """Return a piece without its part of the leading white space."""
        while self.lead and new and new[0] == self.lead[0]:
            self.lead, new = self.lead[1:], new[1:]
        self.lead = "" if new else self.lead
        return new


def hides_system(template: ChatTemplate, system: str) -> bool:
    """Tell whether a chat template leaves out the system prompt.

    Raises: UsageError if it rejects one.
    """
    return bool(system) and bool(template.left_out(with_system(system, [Message("user", "问")])))


def with_system(system: str, messages: Sequence[Message]) -> list[Message]:
    """Return messages with the system prompt first, if there is one."""
    return [*([Message("system", system)] if system else []), *messages]
