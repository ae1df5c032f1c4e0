"""Every error says what to do next, and shows the value that is wrong wherever there is one."""

import ast
import re
from pathlib import Path

from llmctl import errors

PACKAGE = Path(__file__).resolve().parents[1] / "llmctl"
CLASSES = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LlmctlError)
}


def constructions() -> list[tuple[str, ast.Call]]:
    """Return every construction of an error, with where it is."""
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in CLASSES:
                calls.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", node))
    return calls


def argument(call: ast.Call, index: int, name: str) -> ast.expr | None:
    """Return an argument of a call by its position or name."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return call.args[index] if len(call.args) > index else next(iter(given), None)


def test_every_error_has_a_hint():
    without = []
    for where, call in constructions():
        hint = argument(call, 1, "hint")
        is_spread = any(isinstance(a, ast.Starred) for a in call.args)
        if not is_spread and (hint is None or (isinstance(hint, ast.Constant) and not hint.value)):
            without.append(where)
    assert not without, without


ABSENCE = re.compile(r"\b(no|none|not|nothing|empty|exclude|cannot|does|needs|takes|precedes|selects|start|examines)\b")
"""What a message without a value must be about: something that is missing, or that excludes something named in it."""


def test_every_error_shows_its_value():
    assert len(constructions()) > 400
    # A missing extra is named by its package, which is the second argument.
    messages = [
        (where, argument(call, 0, "message"))
        for where, call in constructions()
        if getattr(call.func, "id", "") != "MissingExtraError"
    ]
    constants = [(where, message.value) for where, message in messages if isinstance(message, ast.Constant)]
    unclear = [f"{where} {text!r}" for where, text in constants if "`" not in text and not ABSENCE.search(text)]
    assert not unclear, "\n".join(unclear)
    assert len(constants) < 0.15 * len(messages)
