"""The chat template of a model: selecting it, rendering a conversation, and locating the assistant's answers.

The rendered text is cut where an answer begins, in training as at inference. Special tokens written by the template
become their ids; the same strings inside a message must stay text. They are escaped by a mark character while the
template is rendered, and the mark is removed before encoding (`chat_ids.py`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from llmctl.data.chat_text import BEGIN, PLAIN_TEMPLATE, Rendered, Template
from llmctl.data.conversations import Message
from llmctl.errors import ArtifactError, UsageError
from llmctl.files import parse_json
from llmctl.tokenizer.base import SpecialToken, Tokenizer

if TYPE_CHECKING:
    from llmctl.artifacts.load import Loaded

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
RESERVED = "\ufdd0\ufdd1\ufdd2"
MARK = RESERVED[-1]
"""Escapes special tokens in messages. Also precedes U+FDD8..U+FDDA, which replace reserved characters of a message."""
ESCAPES = {ord(sign): f"{MARK}{chr(ord(sign) + 8)}" for sign in RESERVED}
TOKEN_ROLES = ("bos", "eos", "unk", "pad", "mask", "sep", "cls")
HINT = "mark the answers in the template with {% generation %}"


BOOKKEEPING = ("tool_call_id",)
"""Fields of messages that say nothing to a model."""
PROBE = "问"


class Part(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    is_answer: bool


class ChatTemplate:
    """A chat template and its tokenizer; `is_plain`: the built-in template, for a model without one.

    tools: what the answers may call, for this conversation (`with_tools`).
    Raises: UsageError on first use for a template that is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, tokens: Mapping[str, str], *, is_plain: bool) -> None:
        self.tokenizer, self.template, self.tokens, self.is_plain = tokenizer, Template(source), dict(tokens), is_plain
        self.tools: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the source: compiled templates cannot be sent to worker processes."""
        return rebuild, (self.tokenizer, self.template.source, self.tokens, self.is_plain)

    def files(self) -> dict[str, bytes]:
        """Return the files to store with a model that was trained with this template."""
        return {TEMPLATE_FILE: self.template.source.encode()}

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template marks answers with {% generation %}."""
        return bool(re.search(r"\{%[-+]?\s*generation\b", self.template.source))

    @cached_property
    def specials(self) -> dict[str, SpecialToken]:
        """The special tokens a template can write, by name."""
        return {name: token for name, token in self.tokenizer.special_tokens().items() if name}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A pattern that matches special tokens, longest first."""
        names = sorted(self.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    @cached_property
    def shape(self) -> tuple[str, str]:
        """The white space before an answer, and the special token after it (or an empty string)."""
        _, answer = self._answer([Message("user", "问"), Message("assistant", "答")])
        start = answer.find("答")
        end = self.special_pattern.search(answer, max(start, 0))
        lead = answer[:start] if start > 0 and answer[:start].isspace() else ""
        return lead, end[0] if end else ""

    def with_tools(self, tools: Sequence[Any]) -> "ChatTemplate":
        """Return the template for a conversation with these tools; no text in them is taken for a special token."""
        if not tools and not self.tools:
            return self
        other = ChatTemplate.__new__(ChatTemplate)
        vars(other).update(vars(self))  # what is compiled is shared
        other.tools = tuple(self._literal(tool) for tool in tools)
        return other

    def render(self, messages: Sequence[Message], *, asks: bool) -> Rendered:
        """Render messages as text; `asks`: with the generation prompt at the end."""
        return self.template.render(messages, self.tokens, add_generation_prompt=asks, tools=self.tools)

    def left_out(self, messages: Sequence[Message]) -> list[tuple[int, str]]:
        """Return what the template does not render: (index of the message, name of its field), and (-1, "tools").

        A part is left out if the text stays the same without it.
        """
        messages = self.escaped(messages)
        whole = self.render(messages, asks=False).text

        def is_rendered(index: int, **changes: Any) -> bool:
            changed = [*messages[:index], messages[index]._replace(**changes), *messages[index + 1 :]]
            try:
                return self.render(changed, asks=False).text != whole
            except UsageError:  # the template rejects the conversation without it
                return True

        found = [(-1, "tools")] if self.tools and self.with_tools(()).render(messages, asks=False).text == whole else []
        for index, message in enumerate(messages):
            for name, _ in message.fields:
                rest = tuple(field for field in message.fields if field[0] != name)
                if name not in BOOKKEEPING and not is_rendered(index, fields=rest):
                    found.append((index, name))
            core = message.content.strip()
            if core and core not in whole and not is_rendered(index, content=f"{message.content} {PROBE}"):
                found.append((index, "content"))
        return found

    def escaped(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages in which no text can be mistaken for a special token."""
        return [
            message._replace(content=self._escape(message.content), fields=self._literal(message.fields))
            for message in messages
        ]

    def _literal(self, value: Any) -> Any:
        """Return a value of JSON in whose strings no special token is left; not in its keys, which templates look up."""
        if isinstance(value, str):
            return self._broken(value)
        if isinstance(value, dict):
            return {key: self._literal(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._literal, value))
        return value

    def _broken(self, text: str) -> str:
        return self.special_pattern.sub(lambda match: f"{match[0][0]}{MARK}{match[0][1:]}", text.translate(ESCAPES))

    def _escape(self, content: str) -> str:
        content = self._broken(content)
        core = content.strip()
        if core and self._joins(core):
            content = content.replace(core, f"{MARK}{core}{MARK}", 1)
        return content

    def _joins(self, core: str) -> bool:
        """Return whether a text could form a special token together with the template text around it."""
        heads, tails = self._edges
        longest = max(map(len, heads), default=0)
        sizes = range(1, min(longest, len(core)) + 1)
        return any(core[:size] in tails or core[-size:] in heads for size in sizes) or (
            len(core) < longest and any(core in name for name in self.specials)
        )

    @cached_property
    def _edges(self) -> tuple[set[str], set[str]]:
        """The proper prefixes and suffixes of special tokens."""
        names = self.specials
        heads = {name[:size] for name in names for size in range(1, len(name))}
        return heads, {name[size:] for name in names for size in range(1, len(name))}

    def prompt_parts(self, messages: Sequence[Message]) -> list[Part]:
        """Return the text up to the next answer, cut at the earlier answers.

        The text stays in one part if the template rewrites earlier turns (drops reasoning, inserts a date).
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
        """Return a conversation that ends with an answer, cut at its answers.

        Raises: UsageError if an answer does not follow the prompt used at inference.
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
        last = Part(answer, is_answer=messages[-1].is_trained)
        return [part for part in [*parts, last, Part(rest, is_answer=False)] if part.text]

    def _marked(self, messages: Sequence[Message], *, last_only: bool) -> list[Part]:
        whole = self.render(messages, asks=False)
        if not whole.answers:
            raise UsageError("the chat template's {% generation %} blocks cover none of this conversation", HINT)
        parts = cut(whole)
        last = max(index for index, part in enumerate(parts) if part.is_answer)
        if "".join(part.text for part in parts[:last]) != self.render(messages[:-1], asks=True).text:
            raise UsageError(
                "the chat template's last {% generation %} does not begin where its add_generation_prompt ends",
                "make both agree: the model would be trained after a different prompt than it sees at inference",
            )
        if last_only:
            is_trained = messages[-1].is_trained
            return [Part(part.text, is_answer=is_trained and index == last) for index, part in enumerate(parts)]
        if all(message.is_trained for message in messages if message.role == "assistant"):
            return parts
        return self._weighted(messages, parts)

    def _weighted(self, messages: Sequence[Message], parts: Sequence[Part]) -> list[Part]:
        """Return the parts without the blocks of answers that are not trained."""
        flags: list[bool] = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                n_blocks = len(self.render(messages[: index + 1], asks=False).answers)
                flags += [message.is_trained] * (n_blocks - len(flags))
        n_blocks = sum(part.is_answer for part in parts)
        if len(flags) != n_blocks:
            raise UsageError(
                f"`weight` has no effect: the chat template marks {n_blocks} blocks in the conversation, {len(flags)} up to "
                "its answers",
                "remove the `weight` of the messages, or train only the last answer: --set answers=last",
            )
        trained = iter(flags)
        return [Part(part.text, is_answer=part.is_answer and next(trained)) for part in parts]

    def _chain(self, messages: Sequence[Message]) -> tuple[list[Part], str, str]:
        """Return the parts up to the end of the last answer, their text, and the template text after it.

        Raises: RewritesError if the text of earlier turns is not a prefix of the later text.
        """
        parts: list[Part] = []
        done = rest = ""
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, answer, rest = self._trained(messages[: index + 1])
            if not before.startswith(done):
                raise RewritesError(f"the chat template rewrites earlier turns before message {index + 1}", REWRITES)
            parts += [Part(before[len(done) :], is_answer=False), Part(answer, is_answer=message.is_trained)]
            done = before + answer
        return parts, done, rest

    def _answer(self, messages: Sequence[Message]) -> tuple[str, str]:
        """Return the prompt of the last message, and the text that the message adds to it.

        Raises: RewritesError if the prompt is not a prefix of the whole text.
        """
        whole = self.render(messages, asks=False)
        before = whole.text[: whole.answers[-1][0]] if whole.answers else self.render(messages[:-1], asks=True).text
        if not whole.text.startswith(before):
            raise RewritesError(
                f"the chat template renders message {len(messages)} after a different prompt than its add_generation_prompt",
                HINT,
            )
        return before, whole.text[len(before) :]

    def _trained(self, messages: Sequence[Message]) -> tuple[str, str, str]:
        """Return the text before the last message, the message with its end-of-turn token, and the text after that."""
        before, answer = self._answer(messages)
        core = messages[-1].content.strip()
        start = answer.find(core)  # -1 if the template changed the message
        ends = [end.end() for end in self.special_pattern.finditer(answer, start + len(core) if start >= 0 else 0)]
        cut_at = ends[0] if ends else len(answer)
        if ends and messages[-1].fields:  # special tokens may stand around what follows the text, such as tool calls
            usual = [at for at in ends if answer[:at].endswith(self.shape[1])]
            cut_at = usual[0] if usual else ends[-1]
        return before, answer[:cut_at], answer[cut_at:]


class RewritesError(UsageError):
    """The text of the first turns is not a prefix of the text of more turns."""


REWRITES = f"train only the last answer: --set answers=last; or {HINT}"


def rebuild(tokenizer: Tokenizer, source: str, tokens: Mapping[str, str], is_plain: bool) -> ChatTemplate:
    """Rebuild a pickled template."""
    return ChatTemplate(tokenizer, source, tokens, is_plain=is_plain)


def chat_template(
    tokenizer: Tokenizer, files: Mapping[str, bytes], *, begins_with_bos: bool, source: str | None = None
) -> ChatTemplate:
    """Return the chat template of a model by its files: `source`, else its own, else the plain one.

    Raises: ArtifactError for a file that cannot be read.
    """
    config = config_of(files)
    tokens = token_names(tokenizer, config)
    text = source if source is not None else find_template(files)
    if text is not None:
        return ChatTemplate(tokenizer, text, tokens, is_plain=False)
    plain = (BEGIN if begins_with_bos and tokenizer.bos_id is not None else "") + PLAIN_TEMPLATE
    if plain.startswith(BEGIN) and tokenizer.bos_id is not None:
        tokens["bos_token"] = tokenizer.piece(tokenizer.bos_id)
    tokens["eos_token"] = "" if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id)
    return ChatTemplate(tokenizer, plain, tokens, is_plain=True)


def template_of(loaded: "Loaded") -> ChatTemplate:
    """Return the chat template of a loaded model.

    Raises: UsageError for a model without a tokenizer, or one that is not a decoder.
    """
    if loaded.tokenizer is None:
        raise UsageError(
            f"`{loaded.artifact.path}` has no tokenizer, which chat needs", "import the model with its tokenizer files"
        )
    if loaded.model.config.family != "decoder":
        family = loaded.model.config.family.replace("_", "-")
        raise UsageError(f"`{loaded.artifact.path}` is an {family} and has no chat template", "omit `--chat`")
    return chat_template(loaded.tokenizer, loaded.artifact.files, begins_with_bos=bool(loaded.frame.before))


def find_template(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template in a model's files: `chat_template.jinja`, else the one in its tokenizer config.

    Raises: ArtifactError for a template that is not text.
    """
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode()
        except UnicodeDecodeError as error:
            raise ArtifactError(f"`{TEMPLATE_FILE}` is not UTF-8 at byte {error.start}", "download it again") from None
    template = config_of(files).get("chat_template")
    if isinstance(template, list):  # several templates by name, as Cohere and Hermes ship
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ArtifactError(
            f"`chat_template` in `{CONFIG_FILE}` is {type(template).__name__}, not text", "download it again"
        )
    return template


def config_of(files: Mapping[str, bytes]) -> dict[str, object]:
    """Return the tokenizer config, empty if there is none.

    Raises: ArtifactError if it cannot be read.
    """
    try:
        config = parse_json(files.get(CONFIG_FILE, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{CONFIG_FILE}` cannot be read: {error}", "download it again") from None
    return config if isinstance(config, dict) else {}


def token_names(tokenizer: Tokenizer, config: Mapping[str, object]) -> dict[str, str]:
    """Return the special tokens a template may use by variable name: from the config, else from the tokenizer."""
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
    """Return a text cut at the {% generation %} blocks of its template."""
    parts, position = [], 0
    for start, end in rendered.answers:
        parts += [Part(rendered.text[position:start], is_answer=False), Part(rendered.text[start:end], is_answer=True)]
        position = end
    return [part for part in [*parts, Part(rendered.text[position:], is_answer=False)] if part.text]


def unescaped(text: str) -> str:
    """Return a text without escape marks, with its own reserved characters restored."""
    return re.sub(f"{MARK}([\ufdd8-\ufdda])?", lambda match: chr(ord(match[1]) - 8) if match[1] else "", text)
