"""Jinja for chat templates, which come with models and so from strangers: sandboxed, and bounded in time and size.

The environment is the one that transformers renders templates in: the same trimming of blocks, loop controls,
`raise_exception`, `strftime_now`, `tojson` and the block `{% generation %}`. On top of the sandbox every loop, macro
and operation that can grow a text is counted, so that no template runs without end or fills the memory. Imports
jinja2, so import it inside functions.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000
MAX_CHARS = 4_000_000
"""Rounds of all loops, and characters of any text, that one rendering may take; a conversation is far from both."""
MAX_SECONDS = 20.0

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around what `{% generation %}` holds: noncharacters of Unicode. Texts must not hold them."""

WIDE = ("batch", "center", "indent", "slice", "truncate", "wordwrap")
"""Filters whose arguments say how long something becomes."""


class TemplateLimitError(Exception):
    """A template has taken more time or space than a conversation can need."""


class Budget:
    """What one rendering may still take."""

    def __init__(self) -> None:
        self.n_steps, self.deadline = 0, time.monotonic() + MAX_SECONDS

    def take(self, n_steps: int) -> None:
        """Count steps.

        Raises: TemplateLimitError when there are too many, or too late.
        """
        self.n_steps += n_steps
        if self.n_steps > MAX_STEPS or time.monotonic() > self.deadline:
            raise TemplateLimitError("it does not come to an end")


class Counted(NodeTransformer):
    """Puts a count into every loop and macro, and a size check around `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's names, also below
        """Count the rounds of a loop before and in it."""
        self.generic_visit(node)
        node.iter = own_call("counted", [node.iter])
        node.body.insert(0, nodes.Output([own_call("tick", [])]))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        """Count the calls of a macro."""
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([own_call("tick", [])]))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Join by a function that looks at the size."""
        self.generic_visit(node)
        return own_call("joined", node.nodes)


def own_call(name: str, arguments: Sequence[nodes.Node]) -> nodes.Call:
    """Return the call of a method of the environment, which no template can name."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant has said."""

    tags = {"generation"}  # noqa: RUF012 - as Extension declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Put the marks around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.TemplateData(sign)], lineno=line) for sign in (OPEN, CLOSE))
        return nodes.Scope([first, *body, last], lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; `budget` is set anew for every rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.budget = Budget()
        self.filters |= {name: bounded(self.filters[name]) for name in WIDE}
        self.filters |= {"tojson": to_json, "replace": replace, "join": join, "format": form}
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = Counted().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def concat(self, parts: Iterable[str]) -> str:
        """Return what a block holds."""
        return bounded_join(parts)

    def tick(self) -> str:
        """Count one round."""
        self.budget.take(1)
        return ""

    def counted(self, items: Any) -> Any:
        """Count the rounds a loop is going to have."""
        items = items if hasattr(items, "__len__") or not hasattr(items, "__iter__") else list(items)
        self.budget.take(len(items) if hasattr(items, "__len__") else 0)
        return items

    def joined(self, *parts: Any) -> str:
        """Return what `~` joins."""
        return bounded_join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operation whose result stays in proportion."""
        check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what may be called; methods of a text may not make it enormous."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps `format`
        if isinstance(owner, str):
            check_method(owner, getattr(obj, "__name__", ""), [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)


def check_size(size: int) -> None:
    """Refuse a text that cannot be part of a conversation.

    Raises: TemplateLimitError.
    """
    if size > MAX_CHARS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_CHARS:,} characters")


def bounded_join(parts: Iterable[str]) -> str:
    """Join texts as far as a text may go.

    Raises: TemplateLimitError.
    """
    kept, size = [], 0
    for part in parts:
        size += len(part)
        check_size(size)
        kept.append(part)
    return "".join(kept)


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be out of all proportion.

    Raises: TemplateLimitError.
    """
    if operator == "%" and isinstance(left, str):
        check_method(left, "format", right if isinstance(right, tuple) else [right])
    elif operator == "**":
        check_size(number_size(left) * max(int(right), 1) if isinstance(right, int) else 0)
    elif operator == "*":
        sized, other = (left, right) if hasattr(left, "__len__") else (right, left)
        is_text = hasattr(sized, "__len__") and isinstance(other, int)
        check_size(len(sized) * other if is_text else number_size(left) + number_size(right))
    elif hasattr(left, "__len__") and hasattr(right, "__len__"):
        check_size(len(left) + len(right))


def number_size(value: Any) -> int:
    """Return how long a number is."""
    return value.bit_length() if isinstance(value, int) else 0


def check_method(owner: str, name: str, arguments: Sequence[Any]) -> None:
    """Refuse a method of a text whose result would be out of all proportion.

    Raises: TemplateLimitError.
    """
    numbers = [value for value in arguments if isinstance(value, int)]
    if name in ("format", "format_map"):  # a width stands in the form itself
        numbers += [10 ** min(len(digits), 9) for digits in "".join(c if c.isdecimal() else " " for c in owner).split()]
    check_size(max(map(abs, numbers), default=0))
    if name == "replace" and len(arguments) >= 2 and all(isinstance(value, str) for value in arguments[:2]):
        check_size(len(owner) + owner.count(arguments[0]) * len(arguments[1]))
    if name == "join" and arguments and isinstance(arguments[0], list | tuple):
        check_size(sum(len(item) + len(owner) for item in arguments[0] if isinstance(item, str)))


# --- filters and functions of templates --------------------------------------------------------------------------------


def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses enormous numbers; what jinja2 has noted on it stays noted."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_method("", "", [*args, *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def replace(text: Any, old: str, new: str, count: int = -1) -> str:
    """Return a text with one part of it replaced."""
    text = str(text)
    check_method(text, "replace", [old, new])
    return text.replace(old, new, count)


def join(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """Return items, or one field of each, as one text."""
    texts = (str(item if attribute is None else item[attribute]) for item in items)
    return bounded_join(text if number == 0 else f"{separator}{text}" for number, text in enumerate(texts))


def form(text: Any, *args: Any, **kwargs: Any) -> str:
    """Return printf's form filled in."""
    check_method(str(text), "format", [*args, *kwargs.values()])
    return str(text) % (kwargs or args)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as transformers' templates expect it: without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any) -> str:
    """Refuse a conversation.

    Raises: TemplateError.
    """
    raise TemplateError(str(message))


def strftime_now(text: str) -> str:
    """Return today's date in a form of strftime."""
    check_method(text, "format", [])
    return datetime.now().strftime(text)  # noqa: DTZ005 - local time, as in transformers
