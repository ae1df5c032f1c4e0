"""The report says in one line what the hardware makes slower."""

import pytest

from llmctl.quantizing.report import render

SIDE = {"bytes": 1_000_000, "tokens_per_second_reading": 10.0, "tokens_per_second_writing": 1.0, "loss": 2.0}
RECORD = {
    "bits_per_weight": 8.0,
    "bits_per_weight_layers": 8.0,
    "peak_memory_bytes": 1_000_000,
    "decoding": None,
    "models": {"before": SIDE, "after": SIDE},
}


@pytest.mark.parametrize(
    ("reading", "writing", "line"),
    [
        (0.5, 2.0, "reading is slower on this machine than before"),
        (0.5, 0.9, "reading and writing are slower on this machine than before"),
        (1.0, 1.5, None),
    ],
)
def test_a_scheme_that_is_slower_here_is_told(reading: float, writing: float, line: str | None):
    lines = render(RECORD | {"reading_ratio": reading, "writing_ratio": writing})
    assert [text for text in lines if "slower" in text] == ([line] if line else [])
