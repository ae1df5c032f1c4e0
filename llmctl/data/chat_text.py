"""Chat templates: render messages to the text a model was trained on, as transformers does.

Contains the plain template for models without one. Knows no tokenizers: special tokens are passed in as text.
"""

from collections.abc import Callable, Mapping, Sequence
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
    def _render(self) -> Callable[[Mapping[str, Any]], str]:
        from llmctl.data.chat_process import Renderer
        from llmctl.data.chat_sandbox import compiled

        # Our own template needs no guard; a stranger's can take all memory in one operation of Python.
        return (
            compiled(self.source) if self.source in (PLAIN_TEMPLATE, BEGIN + PLAIN_TEMPLATE) else Renderer(self.source)
        )

    def render(
        self,
        messages: Sequence[Message],
        tokens: Mapping[str, str],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] = (),
    ) -> Rendered:
        """Render messages; `tokens` are the special tokens a template may use, such as `eos_token`.

        Raises: UsageError if the template rejects the messages, fails, or exceeds the limits of the sandbox.
        """
        from llmctl.data.chat_sandbox import CLOSE, OPEN, TemplateFailureError

        dicts = [message.to_dict() for message in messages]
        values = {"messages": dicts, "tools": list(tools) or None, "documents": None, **tokens}
        try:
            text = self._render({**values, "add_generation_prompt": add_generation_prompt})
        except TemplateFailureError as error:
            raise UsageError(f"{self.name} {error}", error.hint) from None
        return cut_marks(text, OPEN, CLOSE)


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
