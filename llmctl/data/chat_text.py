"""Chat templates: messages -> the text that a model has learned to see, as transformers renders it.

Knows Jinja and the plain text of models that bring no template. Refuses to know tokenizers: names of special tokens
are passed in, and what becomes of the text is the caller's affair.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from llmctl.data.conversations import Message
from llmctl.errors import UsageError

BEGIN = "{{ bos_token }}"
PLAIN_TEMPLATE = """\
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}
{%- else %}
{{ (message['role'] | capitalize) + ':\\n' + message['content'] + '\\n\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'Assistant:\\n' }}
{%- endif %}
"""
"""For models without a template: no new tokens, and an answer begins a line, where every tokenizer cuts.

`BEGIN` goes before it for models whose texts begin with a token.
"""
NEXT_USER = "\nUser:\n"
"""What goes on after an answer of the plain template; a model that was not trained on it may not stop there."""


class Rendered(NamedTuple):
    """A conversation as text, and where in it the blocks `{% generation %}` lie."""

    text: str
    answers: list[tuple[int, int]]


class Template:
    """A Jinja chat template; `name` says where it is from, for errors.

    Raises: UsageError, when it is first used, naming the line that is no Jinja.
    """

    def __init__(self, source: str, name: str = "the chat template") -> None:
        self.source, self.name = source, name

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a worker process compile its own."""
        return Template, (self.source, self.name)

    @cached_property
    def _compiled(self) -> tuple[Any, Any]:
        from jinja2.exceptions import TemplateSyntaxError

        from llmctl.data.chat_sandbox import ChatEnvironment

        environment = ChatEnvironment()
        try:
            return environment, environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise UsageError(f"{self.name} line {error.lineno} is no Jinja: {error.message}", HINT) from None
        except (RecursionError, ValueError, SyntaxError, MemoryError) as error:
            raise UsageError(f"{self.name} cannot be compiled: {error}", HINT) from None

    def render(
        self, messages: Sequence[Message], tokens: Mapping[str, str], *, add_generation_prompt: bool
    ) -> Rendered:
        """Return the text of messages; `tokens` are the names a template may use, such as `eos_token`.

        Raises: UsageError with what the template says of messages that it does not take, or why it is stopped.
        """
        from jinja2.exceptions import SecurityError, TemplateError

        from llmctl.data import chat_sandbox as sandbox

        environment, compiled = self._compiled
        environment.budget = sandbox.Budget()
        shown = [message._asdict() for message in messages]
        try:
            parts = compiled.generate(messages=shown, add_generation_prompt=add_generation_prompt, **NOTHING, **tokens)
            text = sandbox.bounded_join(parts)
        except SecurityError as error:
            raise UsageError(f"{self.name} does what no template may: {error}", HINT) from None
        except TemplateError as error:
            raise UsageError(f"{self.name} refuses the conversation: {error}", ORDER) from None
        except sandbox.TemplateLimitError as error:
            raise UsageError(f"{self.name} is stopped: {error}", HINT) from None
        except BROKEN as error:
            raise UsageError(f"{self.name} fails: {type(error).__name__}: {error}", HINT) from None
        return cut_marks(text, sandbox.OPEN, sandbox.CLOSE)


BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, MemoryError)
"""What an expression of a template can raise."""
NOTHING: Mapping[str, None] = {"tools": None, "documents": None}
HINT = "repair it, or take another"
ORDER = "most templates want user and assistant in turn, a system message only at the beginning"


def cut_marks(text: str, first: str, last: str) -> Rendered:
    """Take the marks of `{% generation %}` out of a text and return where they were."""
    head, *blocks = text.split(first)
    pieces, answers, length = [head], [], len(head)
    for block in blocks:
        inner, _, rest = block.partition(last)
        if inner:
            answers.append((length, length + len(inner)))
        pieces += [inner, rest]
        length += len(inner) + len(rest)
    return Rendered("".join(pieces), answers)
