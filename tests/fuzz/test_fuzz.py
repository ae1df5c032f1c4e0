"""Readers of strangers' files say what is wrong: a few hundred of the inputs that `python -m tests.fuzz.run` makes."""

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import inputs

N_INPUTS = 420
NAMES = [name for name, target in TARGETS.items() if target.exists]


def test_readers_raise_only_what_they_say():
    counts, failures = fuzz(NAMES, N_INPUTS)
    assert failures == []
    assert counts.total() >= N_INPUTS - len(NAMES)
    assert {key.split()[0] for key in counts} == set(NAMES)


def test_an_input_follows_from_its_number(tmp_path):
    for name in ("csv", "vocabulary"):
        (tmp_path / name).mkdir()
        TARGETS[name].seeds(tmp_path / name)
        made = [inputs(name, number, tmp_path) for number in range(20)]
        assert made == [inputs(name, number, tmp_path) for number in range(20)]
        assert len({str(files) for files in made}) > 10


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gguf", "model", "quantized", "adapter")])
def test_seeds_are_read_as_they_are(name: str, tmp_path, monkeypatch):
    """A reader that refuses its seeds would refuse their mutations for the wrong reason."""
    from llmctl.errors import LlmctlError

    monkeypatch.setenv("LLMCTL_RUNS", str(tmp_path))
    TARGETS[name].seeds(tmp_path)
    refused = []
    for seed in sorted(tmp_path.iterdir()):
        try:
            TARGETS[name].read(seed)
        except LlmctlError as error:
            refused.append(f"{seed.name}: {error}")
    # Of data and recipes, each is one of several kinds, and the other kinds are tried too.
    assert name in ("jsonl", "csv", "parquet", "recipe", "signals", "template") or refused == []
