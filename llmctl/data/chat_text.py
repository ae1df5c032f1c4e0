"""Chat templates: render messages to the text a model was trained on, as transformers does.

Contains the plain template for models without one. Knows no tokenizers: special tokens are passed in as text.
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
"""For models without a template: adds no tokens, and an answer starts on a new line, where every tokenizer splits.

`BEGIN` is prepended for models whose texts start with a BOS token.
"""
NEXT_USER = "\nUser:\n"
"""What follows an answer in the plain template: a stop string for models that were not trained to end there."""


class Rendered(NamedTuple):
    """A conversation as text, and the (start, stop) positions of its `{% generation %}` blocks."""

    text: str
    answers: list[tuple[int, int]]


class Template:
    """A Jinja chat template; `name` is its origin, for error messages.

    Raises: UsageError, on first use, naming the line that is not valid Jinja.
    """

    def __init__(self, source: str, name: str = "the chat template") -> None:
        self.source, self.name = source, name

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the source only: compiled templates cannot be pickled, so each worker compiles its own."""
        return Template, (self.source, self.name)

    @cached_property
    def _compiled(self) -> tuple[Any, Any]:
        from jinja2.exceptions import TemplateSyntaxError

        from llmctl.data.chat_sandbox import ChatEnvironment

        environment = ChatEnvironment()
        try:
            return environment, environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise UsageError(f"{self.name} line {error.lineno} is not valid Jinja: {error.message}", HINT) from None
        except (RecursionError, ValueError, SyntaxError, MemoryError) as error:
            raise UsageError(f"{self.name} cannot be compiled: {error}", HINT) from None

    def render(
        self, messages: Sequence[Message], tokens: Mapping[str, str], *, add_generation_prompt: bool
    ) -> Rendered:
        """Render messages; `tokens` are the special tokens a template may use, such as `eos_token`.

        Raises: UsageError if the template rejects the messages, fails, or exceeds the limits of the sandbox.
        """
        from jinja2.exceptions import SecurityError, TemplateError

        from llmctl.data import chat_sandbox as sandbox

        environment, compiled = self._compiled
        environment.budget = sandbox.Budget()
        dicts = [message._asdict() for message in messages]
        try:
            parts = compiled.generate(messages=dicts, add_generation_prompt=add_generation_prompt, **NOTHING, **tokens)
            text = sandbox.bounded_join(parts)
        except SecurityError as error:
            raise UsageError(f"{self.name} does something the sandbox forbids: {error}", HINT) from None
        except TemplateError as error:
            raise UsageError(f"{self.name} rejects the conversation: {error}", ORDER) from None
        except sandbox.TemplateLimitError as error:
            raise UsageError(f"{self.name} was stopped: {error}", HINT) from None
        except BROKEN as error:
            raise UsageError(f"{self.name} fails: {type(error).__name__}: {error}", HINT) from None
        return cut_marks(text, sandbox.OPEN, sandbox.CLOSE)


BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, MemoryError)
"""Exceptions that expressions in a template can raise."""
NOTHING: Mapping[str, None] = {"tools": None, "documents": None}
HINT = "fix the template, or use another one"
ORDER = "most templates require alternating user and assistant messages, and a system message only at the start"


def cut_marks(text: str, first: str, last: str) -> Rendered:
    """Remove the `{% generation %}` markers from a text and return the positions of the blocks."""
    head, *blocks = text.split(first)
    pieces, answers, length = [head], [], len(head)
    for block in blocks:
        inner, _, rest = block.partition(last)
        if inner:
            answers.append((length, length + len(inner)))
        pieces += [inner, rest]
        length += len(inner) + len(rest)
    return Rendered("".join(pieces), answers)
