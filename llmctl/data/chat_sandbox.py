"""A sandboxed Jinja environment for chat templates, which come with models and are untrusted.

It matches the environment in which transformers renders templates: block trimming, loop controls, `raise_exception`,
`strftime_now`, `tojson` and the block `{% generation %}`. Beyond Jinja's sandbox, every loop, macro and operation that
can grow a string counts against a budget. That names most of what goes wrong, but cannot bound a template: Python has
too many operations whose cost depends on what they are given. `chat_process.py` does. Imports jinja2: import this module
inside functions.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000
MAX_CHARS = 4_000_000
"""Limits of one rendering: loop iterations in total and characters of any string; real conversations stay far below."""
MAX_SECONDS = 0.6
"""Of one processor; a real conversation takes a few milliseconds."""
HINT = "fix the template, or use another one"
ORDER = "most templates require alternating user and assistant messages, and a system message only at the start"

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Markers around the content of `{% generation %}`: Unicode noncharacters, which texts must not contain."""

WIDE = ("batch", "center", "indent", "slice", "truncate", "wordwrap")
"""Filters whose numeric arguments determine the size of the result."""


class TemplateLimitError(Exception):
    """A template exceeded the time or size limit."""


class TemplateFailureError(Exception):
    """Why a template cannot be used or rejects a conversation: the rest of a sentence about it, and a hint."""

    def __init__(self, what: str, hint: str = HINT) -> None:
        super().__init__(what)
        self.hint = hint


class Budget:
    """The steps and time left for one rendering."""

    def __init__(self) -> None:
        self.n_steps, self.deadline = 0, time.thread_time() + MAX_SECONDS

    def take(self, n_steps: int) -> None:
        """Use up steps.

        Raises: TemplateLimitError if the steps or the time are exhausted.
        """
        self.n_steps += n_steps
        if self.n_steps > MAX_STEPS or time.thread_time() > self.deadline:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} loop iterations or {MAX_SECONDS:g} seconds")


class Counted(NodeTransformer):
    """Instruments a template: counts loop iterations and macro calls, checks the size of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's names, also below
        """Count a loop's iterations before it starts (by length) and one by one (for generators)."""
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
        """Replace `~` by a join that checks the size."""
        self.generic_visit(node)
        return own_call("joined", node.nodes)


def own_call(name: str, arguments: Sequence[nodes.Node]) -> nodes.Call:
    """Build a call of a method of the environment, which templates cannot reach by name."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the assistant's tokens, which are trained on."""

    tags = {"generation"}  # noqa: RUF012 - as Extension declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Put markers around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.TemplateData(sign)], lineno=line) for sign in (OPEN, CLOSE))
        return nodes.Scope([first, *body, last], lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template; `budget` is replaced before every rendering."""

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
        """Join the output of a block, checking the size."""
        return bounded_join(parts)

    def tick(self) -> str:
        """Count one iteration; the empty string adds nothing to the output."""
        self.budget.take(1)
        return ""

    def counted(self, items: Any) -> Any:
        """Count all iterations of a loop in advance."""
        items = items if hasattr(items, "__len__") or not hasattr(items, "__iter__") else list(items)
        self.budget.take(len(items) if hasattr(items, "__len__") else 0)
        return items

    def joined(self, *parts: Any) -> str:
        """Evaluate `~`, checking the size."""
        return bounded_join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate a binary operation, checking the size of its result."""
        check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function as the sandbox allows, checking the result size of string methods."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps `format`
        if isinstance(owner, str):
            check_method(owner, getattr(obj, "__name__", ""), [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)


BROKEN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that expressions in a template can raise."""


def compiled(source: str) -> Callable[[Mapping[str, Any]], str]:
    """Compile a template and return a function that renders it with values.

    Both raise: TemplateFailureError.
    """
    environment = ChatEnvironment()
    try:
        template = environment.from_string(source)
    except TemplateSyntaxError as error:
        raise TemplateFailureError(f"line {error.lineno} is not valid Jinja: {error.message}") from None
    except TemplateLimitError as error:
        raise TemplateFailureError(f"was stopped: {error}") from None
    except (SyntaxError, MemoryError, *BROKEN) as error:
        raise TemplateFailureError(f"cannot be compiled: {error}") from None

    def render(values: Mapping[str, Any]) -> str:
        environment.budget = Budget()
        try:
            return bounded_join(template.generate(**values))
        except SecurityError as error:
            raise TemplateFailureError(f"does something the sandbox forbids: {error}") from None
        except TemplateError as error:
            raise TemplateFailureError(f"rejects the conversation: {error}", ORDER) from None
        except TemplateLimitError as error:
            raise TemplateFailureError(f"was stopped: {error}") from None
        except MemoryError:
            raise TemplateFailureError("was stopped: it takes more memory than a template may") from None
        except BROKEN as error:
            raise TemplateFailureError(f"fails: {type(error).__name__}: {error}") from None

    return render


def check_size(size: int) -> None:
    """Check the size of a string, or the bits of a number, before it is built.

    Raises: TemplateLimitError.
    """
    if size > MAX_CHARS:
        raise TemplateLimitError(f"it builds a string of more than {MAX_CHARS:,} characters")


def bounded_join(parts: Iterable[str]) -> str:
    """Join strings, checking the size after each.

    Raises: TemplateLimitError.
    """
    kept, size = [], 0
    for part in parts:
        size += len(part)
        check_size(size)
        kept.append(part)
    return "".join(kept)


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Check the size that the result of a binary operation would have.

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
    """Return an integer's size in bits, 0 for anything else."""
    return value.bit_length() if isinstance(value, int) else 0


def check_method(owner: str, name: str, arguments: Sequence[Any]) -> None:
    """Check the size that the result of a string method would have.

    Raises: TemplateLimitError.
    """
    numbers = [value for value in arguments if isinstance(value, int)]
    if name in ("format", "format_map"):  # the format string itself contains widths
        numbers += [10 ** min(len(digits), 9) for digits in "".join(c if c.isdecimal() else " " for c in owner).split()]
    check_size(max(map(abs, numbers), default=0))
    if name == "replace" and len(arguments) >= 2 and all(isinstance(value, str) for value in arguments[:2]):
        check_size(len(owner) + owner.count(arguments[0]) * len(arguments[1]))
    if name == "join" and arguments and isinstance(arguments[0], list | tuple):
        check_size(sum(len(item) + len(owner) for item in arguments[0] if isinstance(item, str)))


# --- filters and functions of templates --------------------------------------------------------------------------------


def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter to check its numeric arguments; functools.wraps keeps the attributes jinja2 set on it."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_method("", "", [*args, *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def replace(text: Any, old: str, new: str, count: int = -1) -> str:
    """Implement the filter `replace`, checking the size."""
    text = str(text)
    check_method(text, "replace", [old, new])
    return text.replace(old, new, count)


def join(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """Implement the filter `join`, checking the size."""
    texts = (str(item if attribute is None else item[attribute]) for item in items)
    return bounded_join(text if number == 0 else f"{separator}{text}" for number, text in enumerate(texts))


def form(text: Any, *args: Any, **kwargs: Any) -> str:
    """Implement the filter `format` (printf style), checking the size."""
    check_method(str(text), "format", [*args, *kwargs.values()])
    return str(text) % (kwargs or args)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Serialize to JSON without HTML escapes, as transformers does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any) -> str:
    """Let a template reject a conversation.

    Raises: TemplateError.
    """
    raise TemplateError(str(message))


def strftime_now(text: str) -> str:
    """Format the current local time, as transformers does."""
    check_method(text, "format", [])
    return datetime.now().strftime(text)  # noqa: DTZ005 - local time, as in transformers
