"""The dry run's prediction of a layout is within a tenth of what its processes take (`benchmarks/memory.py`: all rows)."""

import importlib.util
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("needs /proc/self/clear_refs", allow_module_level=True)
PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
SPEC = importlib.util.spec_from_file_location("memory_benchmark", PATH)
assert SPEC is not None
assert SPEC.loader is not None
benchmark = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(benchmark)


@pytest.mark.parametrize(
    "row", ["decoder, adamw", "decoder, 2 ranks fsdp, recomputed", "decoder, 2 ranks deterministic"]
)
def test_the_prediction_is_within_a_tenth_of_the_peak(row: str):
    assert benchmark.is_close(row)
