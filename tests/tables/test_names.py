"""The suggestion for a misspelled name is the one with the fewest typing errors."""

import ast
from pathlib import Path

import pytest

from llmctl.cli import run
from llmctl.tables.names import closest, edits
from llmctl.tables.objectives import OBJECTIVES

PACKAGE = Path(__file__).resolve().parents[2] / "llmctl"


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("cml", OBJECTIVES, "clm"),
        ("mml", OBJECTIVES, "mlm"),
        ("sapn", OBJECTIVES, "span"),
        ("pretain", ("pretrain", "presets"), "pretrain"),
        ("class", ("chat", "classify"), "classify"),
        ("nothing like it", ("chat", "classify"), ""),
        ("x" * 100_000, ("chat", "x" * 90), "x" * 90),
        ("chat", (), ""),
    ],
)
def test_the_closest_name(name, known, meant):
    assert closest(name, known) == meant


def test_edits_are_counted():
    pairs = [("", "abc", 3), ("clm", "cml", 1), ("mlm", "cml", 2), ("kitten", "sitting", 3), ("ca", "abc", 3)]
    for left, right, count in pairs:
        assert edits(left, right) == edits(right, left) == count


def test_an_objective_with_swapped_letters(capsys):
    assert run(["pretrain", "--objective", "cml"]) == 2
    assert "did you mean `clm`?" in capsys.readouterr().err


def test_there_is_one_suggestion_helper():
    for path in PACKAGE.rglob("*.py"):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "difflib"
            for alias in node.names
        }
        assert "get_close_matches" not in imported, path
