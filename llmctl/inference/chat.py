"""A conversation with a model: what was said, what of it still fits into the context, one answer at a time.

A decoder sees the turns through its chat template; an encoder-decoder takes each message as a source of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig
from llmctl.data.chat_text import NEXT_USER
from llmctl.data.conversations import Message
from llmctl.errors import UsageError
from llmctl.inference import sampling
from llmctl.inference.chat_ids import encode_prompt_chat, end_of_turn_ids
from llmctl.inference.chat_template import ChatTemplate, template_of
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.generate import Completion, Prompt, generate
from llmctl.inference.prefix import Prefix

ROOM_FRAC = 4
"""A quarter of the context is kept for the answer, unless it may not be as long."""


PLAIN_NOTE = "the model has no chat template; a plain one is used, which it may not have been trained on"


@dataclass(frozen=True)
class Turn:
    """How single messages are put to a decoder, and its answers taken: for `generate --chat`."""

    template: ChatTemplate
    system: str = ""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a message up to where the assistant is to speak."""
        return encode_prompt_chat(self.template, with_system(self.system, [Message("user", text)]))

    def config(self, config: GenerateConfig) -> GenerateConfig:
        """Return settings for answers: a model that was not trained to may not stop before it speaks as the user."""
        return replace(config, stop=(*config.stop, NEXT_USER)) if self.template.is_plain else config

    @property
    def ends(self) -> set[int]:
        """The ids that end an answer."""
        return end_of_turn_ids(self.template)

    def lead(self) -> "Lead":
        """Return what takes the template's white space out of an answer that comes in pieces."""
        return Lead(self.template.shape[0])

    def clean(self, completion: Completion) -> Completion:
        """Return a completion without the white space that the template puts before an answer."""
        return replace(completion, text=completion.text.removeprefix(self.template.shape[0]))


@dataclass(frozen=True)
class Answer:
    """What the model said; finish as in `Completion`, or `interrupted`; `is_cut`: turns no longer fit, first time."""

    text: str
    finish: str
    is_cut: bool


class Chat:
    """A conversation; `messages` is all of it but the system's text, `start` the first that the model still sees.

    Raises: UsageError for settings or a model that cannot work.
    """

    def __init__(self, loaded: Loaded, config: GenerateConfig, system: str = "") -> None:
        sampling.check(config)
        if loaded.tokenizer is None:
            raise UsageError(f"`{loaded.artifact.path}` has no tokenizer", "llmctl generate --ids takes token ids")
        self.loaded, self.messages, self.start, self.n_asked = loaded, list[Message](), 0, 0
        self.template = template_of(loaded) if loaded.model.config.family == "decoder" else None
        self.turn = Turn(self.template) if self.template else None
        self.config = self.turn.config(config) if self.turn else config
        self.prefix = Prefix()  # each turn begins with all that was said before it
        self.system = ""
        self.instruct(system)

    def instruct(self, system: str) -> None:
        """Set the system's text; none where it is empty.

        Raises: UsageError for a model that has no place for it.
        """
        if system and self.template is None:
            raise UsageError("an encoder-decoder takes no system text", "write it into the message")
        self.system = system

    def reset(self) -> None:
        """Forget what was said; the system's text stays."""
        self.messages, self.start = [], 0

    def record(self) -> dict[str, list[dict[str, str]]]:
        """Return the conversation as a row that `read_conversations` reads."""
        return {"messages": [message._asdict() for message in with_system(self.system, self.messages)]}

    def ask(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Say something and return the answer; `on_text` gets it as it comes.

        An interrupt (Ctrl-C) ends the answer and keeps what was written of it; if nothing was, nothing was said.
        Raises: UsageError for a message that does not fit, or is refused by the template; nothing was said then.
        """
        said = [*self.messages, Message("user", text)]
        ids, start = self._fit(said)
        lead, ends = (self.turn.lead(), self.turn.ends) if self.turn else (Lead(""), set[int]())
        heard: list[str] = []

        def hear(_: int, new: str) -> None:
            if shown := lead.cut(new):
                heard.append(shown)
                on_text(shown)

        prompt = Prompt(self.n_asked, ids, text)
        try:
            finish = next(generate(self.loaded, [prompt], self.config, hear, ends=ends, prefix=self.prefix)).finish
        except KeyboardInterrupt:
            finish = "interrupted"
        answer = "".join(heard)
        if answer or finish != "interrupted":
            is_cut, self.start, self.n_asked = start > 0 == self.start, start, self.n_asked + 1
            self.messages = [*said, Message("assistant", answer)]
            return Answer(answer, finish, is_cut)
        return Answer("", finish, is_cut=False)

    def _fit(self, said: Sequence[Message]) -> tuple[list[int], int]:
        """Return the prompt's ids and the first message in it: the oldest turns go where the context is full."""
        if self.template is None:
            return encode_prompt(self.loaded, said[-1].content), len(said) - 1
        limit = self.loaded.model.config.max_positions
        room = min(self.config.max_tokens, limit // ROOM_FRAC)
        starts = [place for place, message in enumerate(said) if message.role == "user" and place >= self.start]
        for start in starts:
            ids = encode_prompt_chat(self.template, with_system(self.system, said[start:]))
            if len(ids) + room <= limit:
                return ids, start
        if len(ids) >= limit:  # a long message alone may use the room of its answer, but not all of it
            raise UsageError(
                f"the message has {len(ids)} tokens in its template, the model's context is {limit}", "shorten it"
            )
        return ids, starts[-1]


class Lead:
    """Takes the white space that a template puts before an answer out of a text that comes in pieces."""

    def __init__(self, lead: str) -> None:
        self.lead = lead

    def cut(self, new: str) -> str:
        """Return a piece without what of it is still the lead."""
        while self.lead and new and new[0] == self.lead[0]:
            self.lead, new = self.lead[1:], new[1:]
        self.lead = "" if new else self.lead
        return new


def with_system(system: str, messages: Sequence[Message]) -> list[Message]:
    """Return messages after the system's text, where there is one."""
    return [*([Message("system", system)] if system else []), *messages]
