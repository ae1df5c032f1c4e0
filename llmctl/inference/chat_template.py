"""A model's chat template: which one, the text of a conversation, and where in it the assistant speaks.

The text is cut where the assistant begins to speak, in training as at inference. Special tokens that the template
writes are to become their ids, the same words inside a message to stay text: they are broken by a mark while the
template is rendered, which is taken out before encoding (`chat_ids.py`).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from llmctl.data.chat_text import BEGIN, PLAIN_TEMPLATE, Rendered, Template
from llmctl.data.conversations import Message
from llmctl.errors import ArtifactError, UsageError
from llmctl.tokenizer.base import SpecialToken, Tokenizer

if TYPE_CHECKING:
    from llmctl.artifacts.load import Loaded

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
RESERVED = "\ufdd0\ufdd1\ufdd2"
MARK = RESERVED[-1]
"""Breaks special tokens in messages. Also before U+FDD8..U+FDDA, which stand for a message's own reserved characters."""
STANDING_IN = {ord(sign): f"{MARK}{chr(ord(sign) + 8)}" for sign in RESERVED}
TOKEN_ROLES = ("bos", "eos", "unk", "pad", "mask", "sep", "cls")
HINT = "a template that marks answers with {% generation %} says itself what is trained"


class Part(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    is_answer: bool


class ChatTemplate:
    """A model's template with the tokenizer it is for; `is_plain`: the model brought none.

    Raises: UsageError at the first use for a template that is no Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, tokens: Mapping[str, str], *, is_plain: bool) -> None:
        self.tokenizer, self.template, self.tokens, self.is_plain = tokenizer, Template(source), dict(tokens), is_plain

    def __reduce__(self) -> tuple[object, ...]:
        """Let a worker process make its own."""
        return rebuild, (self.tokenizer, self.template.source, self.tokens, self.is_plain)

    def files(self) -> dict[str, bytes]:
        """Return what has to lie beside a model that was trained with this template."""
        return {TEMPLATE_FILE: self.template.source.encode()}

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template itself says what is the assistant's."""
        return bool(re.search(r"\{%[-+]?\s*generation\b", self.template.source))

    @cached_property
    def specials(self) -> dict[str, SpecialToken]:
        """The special tokens that a template can write."""
        return {name: token for name, token in self.tokenizer.special_tokens().items() if name}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """The longest special token at a place."""
        names = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    @cached_property
    def shape(self) -> tuple[str, str]:
        """The white space before an answer, and the special token after it (or nothing)."""
        _, answer = self._answer([Message("user", "问"), Message("assistant", "答")])
        place = answer.find("答")
        end = self.special_pattern.search(answer, max(place, 0))
        lead = answer[:place] if place > 0 and answer[:place].isspace() else ""
        return lead, end[0] if end else ""

    def render(self, messages: Sequence[Message], *, asks: bool) -> Rendered:
        """Return messages as text; `asks`: up to where the assistant is to speak."""
        return self.template.render(messages, self.tokens, add_generation_prompt=asks)

    def broken(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages in which nothing can be taken for a special token."""
        return [message._replace(content=self._break(message.content)) for message in messages]

    def _break(self, content: str) -> str:
        content = content.translate(STANDING_IN)
        content = self.special_pattern.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", content)
        core = content.strip()
        if core and self._joins(core):
            content = content.replace(core, f"{MARK}{core}{MARK}", 1)
        return content

    def _joins(self, core: str) -> bool:
        """Tell whether a text could become part of a special token together with what stands around it."""
        heads, tails = self._edges
        longest = max(map(len, heads), default=0)
        sizes = range(1, min(longest, len(core)) + 1)
        return any(core[:size] in tails or core[-size:] in heads for size in sizes) or (
            len(core) < longest and any(core in name for name in self.specials)
        )

    @cached_property
    def _edges(self) -> tuple[set[str], set[str]]:
        """The beginnings and the ends of special tokens."""
        names = self.specials
        heads = {name[:size] for name in names for size in range(1, len(name))}
        return heads, {name[size:] for name in names for size in range(1, len(name))}

    def prompt_parts(self, messages: Sequence[Message]) -> list[Part]:
        """Return the text up to the assistant's next words, cut at its earlier ones.

        A template that rewrites what was said before (thoughts left out, a date put in) is not cut.
        """
        if self.marks_answers:
            return cut(self.render(messages, asks=True))
        try:
            parts, done, _ = self._chain(messages)
        except RewritesError:
            parts, done = [], ""
        text = self.render(messages, asks=True).text
        if not text.startswith(done):
            return [Part(text, is_answer=False)]
        return [*parts, Part(text[len(done) :], is_answer=False)]

    def answer_parts(self, messages: Sequence[Message], *, last_only: bool) -> list[Part]:
        """Return a whole conversation that ends with the assistant, cut at its words.

        Raises: UsageError where an answer does not follow what is fed at inference.
        """
        if self.marks_answers:
            return self._marked(messages, last_only=last_only)
        if last_only:
            parts = self.prompt_parts(messages[:-1])
            _, answer, rest = self._trained(messages)
        else:
            parts, _, rest = self._chain(messages)
            answer = ""
        parts = [Part(part.text, is_answer=part.is_answer and not last_only) for part in parts]
        return [part for part in [*parts, Part(answer, is_answer=True), Part(rest, is_answer=False)] if part.text]

    def _marked(self, messages: Sequence[Message], *, last_only: bool) -> list[Part]:
        whole = self.render(messages, asks=False)
        if not whole.answers:
            raise UsageError("the chat template marks nothing of this conversation with {% generation %}", HINT)
        parts = cut(whole)
        last = max(place for place, part in enumerate(parts) if part.is_answer)
        if "".join(part.text for part in parts[:last]) != self.render(messages[:-1], asks=True).text:
            raise UsageError(
                "the chat template's last {% generation %} does not begin where its add_generation_prompt ends",
                "a model would be trained on another beginning than it sees",
            )
        if last_only:
            return [Part(part.text, is_answer=place == last) for place, part in enumerate(parts)]
        return parts

    def _chain(self, messages: Sequence[Message]) -> tuple[list[Part], str, str]:
        """Return the parts up to the end of the last answer, their text, and what the template puts after it.

        Raises: RewritesError when an earlier text is not the beginning of the next.
        """
        parts: list[Part] = []
        done = rest = ""
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, answer, rest = self._trained(messages[: place + 1])
            if not before.startswith(done):
                raise RewritesError(f"the chat template rewrites earlier turns before message {place + 1}", REWRITES)
            parts += [Part(before[len(done) :], is_answer=False), Part(answer, is_answer=True)]
            done = before + answer
        return parts, done, rest

    def _answer(self, messages: Sequence[Message]) -> tuple[str, str]:
        """Return the text that asks for the last message, and what that message adds to it.

        Raises: RewritesError when the text does not go on from there.
        """
        whole = self.render(messages, asks=False)
        before = whole.text[: whole.answers[-1][0]] if whole.answers else self.render(messages[:-1], asks=True).text
        if not whole.text.startswith(before):
            raise RewritesError(
                f"the chat template writes message {len(messages)} on another beginning than its add_generation_prompt",
                HINT,
            )
        return before, whole.text[len(before) :]

    def _trained(self, messages: Sequence[Message]) -> tuple[str, str, str]:
        """Return the text before the last message, its own up to the token that ends the turn, and what follows that."""
        before, answer = self._answer(messages)
        core = messages[-1].content.strip()
        place = answer.find(core)  # a template may have changed the words
        end = self.special_pattern.search(answer, place + len(core) if place >= 0 else 0)
        cut_at = end.end() if end else len(answer)
        return before, answer[:cut_at], answer[cut_at:]


class RewritesError(UsageError):
    """A template's text of the first turns is not the beginning of its text of more."""


REWRITES = f"train the last answer only, or {HINT}"


def rebuild(tokenizer: Tokenizer, source: str, tokens: Mapping[str, str], is_plain: bool) -> ChatTemplate:
    """Return a template in another process."""
    return ChatTemplate(tokenizer, source, tokens, is_plain=is_plain)


def chat_template(
    tokenizer: Tokenizer, files: Mapping[str, bytes], *, begins_with_bos: bool, source: str | None = None
) -> ChatTemplate:
    """Return the template of a model whose files these are: `source`, else its own, else the plain one.

    Raises: ArtifactError for a file that cannot be read.
    """
    config = config_of(files)
    tokens = token_names(tokenizer, config)
    found = source if source is not None else find_template(files)
    if found is not None:
        return ChatTemplate(tokenizer, found, tokens, is_plain=False)
    plain = (BEGIN if begins_with_bos and tokenizer.bos_id is not None else "") + PLAIN_TEMPLATE
    if plain.startswith(BEGIN) and tokenizer.bos_id is not None:
        tokens["bos_token"] = tokenizer.piece(tokenizer.bos_id)
    tokens["eos_token"] = "" if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id)
    return ChatTemplate(tokenizer, plain, tokens, is_plain=True)


def template_of(loaded: "Loaded") -> ChatTemplate:
    """Return the template that a loaded model is talked to with.

    Raises: UsageError for a model without a tokenizer, or one that is no decoder.
    """
    if loaded.tokenizer is None:
        raise UsageError(
            f"`{loaded.artifact.path}` has no tokenizer", "a conversation needs one; import the model with it"
        )
    if loaded.model.config.family != "decoder":
        family = loaded.model.config.family.replace("_", "-")
        raise UsageError(f"`{loaded.artifact.path}` is an {family}, which knows no turns", "give it the text itself")
    return chat_template(loaded.tokenizer, loaded.artifact.files, begins_with_bos=loaded.begins_with_bos)


def find_template(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template among a model's files: `chat_template.jinja`, else the one its tokenizer's config has.

    Raises: ArtifactError for a template that is no text.
    """
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise ArtifactError(f"`{TEMPLATE_FILE}` is not UTF-8 at byte {error.start}", "fetch it again") from None
    template = config_of(files).get("chat_template")
    if isinstance(template, list):  # several of them by name, as in Cohere's and Hermes's
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ArtifactError(f"`chat_template` in `{CONFIG_FILE}` is {type(template).__name__}, not text")
    return template


def config_of(files: Mapping[str, bytes]) -> dict[str, object]:
    """Return what the tokenizer's config says.

    Raises: ArtifactError if it cannot be read.
    """
    try:
        config = json.loads(files.get(CONFIG_FILE, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{CONFIG_FILE}` cannot be read: {error}", "fetch it again") from None
    return config if isinstance(config, dict) else {}


def token_names(tokenizer: Tokenizer, config: Mapping[str, object]) -> dict[str, str]:
    """Return the names of special tokens that a template may use: the config's, or the tokenizer's where it says none."""
    names: dict[str, str] = {}
    keys = [f"{role}_token" for role in TOKEN_ROLES]
    if any(key in config for key in keys):
        for key in keys:
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[key] = value
        return names
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    return {f"{role}_token": tokenizer.piece(index) for role, index in ids.items() if index is not None}


def cut(rendered: Rendered) -> list[Part]:
    """Return a text cut at the blocks that its template marks."""
    parts, place = [], 0
    for start, end in rendered.answers:
        parts += [Part(rendered.text[place:start], is_answer=False), Part(rendered.text[start:end], is_answer=True)]
        place = end
    return [part for part in [*parts, Part(rendered.text[place:], is_answer=False)] if part.text]


def unbroken(text: str) -> str:
    """Return a text without the marks that broke it, its own reserved characters back in place."""
    return re.sub(f"{MARK}([\ufdd8-\ufdda])?", lambda found: chr(ord(found[1]) - 8) if found[1] else "", text)
