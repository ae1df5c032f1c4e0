"""Published architectures: transformers' random models through our core, and back through its classes.

The list is `tests/support/architectures.py`; `python -m tests.support.architectures` prints the table of
`benchmarks/architectures.md`.
"""

import pytest
import torch

from llmctl.errors import ArtifactError
from llmctl.families.table import READ
from llmctl.formats.artifact import read_artifact
from tests.support.architectures import VARIANTS, Measured, build, measure

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = pytest.mark.interop

LARGEST_DIFFERENCE = 1e-4
"""Of float32 logits whose standard deviation is about 1: other orders of the same sums."""
REFUSED = {name for name, variant in VARIANTS.items() if variant.architecture not in READ}


def test_at_least_75_variants_are_read():
    assert len(VARIANTS) - len(REFUSED) >= 75


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in REFUSED])
def test_it_is_computed_exactly_and_written_back(name, tmp_path):
    found: Measured = measure(VARIANTS[name], tmp_path)
    assert found.difference < LARGEST_DIFFERENCE * max(1.0, found.deviation), "reading"
    assert found.round_trip < LARGEST_DIFFERENCE * max(1.0, found.deviation), "writing"
    assert found.written in (VARIANTS[name].architecture, *REWRITTEN.get(name, ())), found.written
    assert found.cached == 0 or found.cached < LARGEST_DIFFERENCE * max(1.0, found.deviation), "decoding with a cache"
    assert found.same_text, "greedy text"


REWRITTEN = {
    "qwen3-bare": ("Qwen3ForCausalLM",),
    "bert-pretraining": ("BertForMaskedLM",),
    "electra": ("ElectraModel",),
}
"""Architectures that are read as others: without the head of a task that we do not have."""


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_any_other_is_refused_by_name(name, tmp_path):
    build(VARIANTS[name], tmp_path)
    with pytest.raises(ArtifactError) as caught:
        read_artifact(tmp_path)
    assert VARIANTS[name].architecture in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["gemma", "gemma3", "nemotron"])
def test_norms_of_half_precision_files_are_not_rounded(name, tmp_path):
    """1 + w of a bfloat16 w near 0 needs more digits than bfloat16 has."""
    model = build(VARIANTS[name], tmp_path / "float32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    again = type(model).from_pretrained(tmp_path / "bfloat16", dtype=torch.float32).eval()
    found = measure(VARIANTS[name], tmp_path / "bfloat16", model=again)
    assert found.difference < LARGEST_DIFFERENCE * max(1.0, found.deviation)
