"""The peak of memory is counted anew when that is asked for."""

import pytest
import torch

from llmctl.machine import forget_peak_memory, give_back_memory, peak_since_forgotten


def test_the_peak_is_counted_anew():
    cpu = torch.device("cpu")
    if not forget_peak_memory(cpu):
        pytest.skip("this system does not reset the mark")
    block = torch.ones(64 << 20)
    high = peak_since_forgotten(cpu)
    del block
    give_back_memory()
    assert forget_peak_memory(cpu)
    low = peak_since_forgotten(cpu)
    assert high is not None
    assert low is not None
    assert high - low > 200 << 20
