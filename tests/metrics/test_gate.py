import math

import pytest

from llmctl.errors import UsageError
from llmctl.metrics.gate import Gate, parse_gate


def test_amounts_of_the_gate():
    assert parse_gate(" 1.5% ") == Gate(0.015, True, "1.5%")
    assert parse_gate(".5") == Gate(0.5, False, ".5")
    for text in ("", "-1", "1 %%", "nan", "one"):
        with pytest.raises(UsageError, match="--max-drop"):
            parse_gate(text)


def test_what_is_more_and_what_is_less():
    gate = parse_gate("10%")
    assert gate.holds("loss", 2.0, 2.19)
    assert not gate.holds("loss", 2.0, 2.3)
    assert gate.holds("loss", 2.0, 1.0)
    assert gate.holds("accuracy", 0.8, 0.73)
    assert not gate.holds("accuracy", 0.8, 0.7)
    assert not gate.holds("loss", 2.0, math.nan)
