"""The peak of memory is counted anew when that is asked for; the choice of a precision stops early."""

from collections import Counter
from functools import partial

import pytest
import torch

from llmctl import machine
from llmctl.machine import (
    choose_dtype,
    forget_peak_memory,
    give_back_memory,
    name_of,
    peak_since_forgotten,
    product_rate,
    race,
)


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


@pytest.fixture
def counted(monkeypatch):
    """Products by dtype and size, and a processor on which those in bfloat16 take `slower` times as long."""
    calls: Counter[tuple[str, int]] = Counter()

    def set_up(slower: float) -> Counter[tuple[str, int]]:
        def product(dtype: torch.dtype, size: int, device: str = "cpu"):
            def call():
                calls[name_of(dtype), size] += 1
                time_now[0] += size**3 * (slower if dtype == torch.bfloat16 else 1.0)

            return call

        monkeypatch.setattr(machine, "matrix_product", product)
        return calls

    time_now = [0.0]
    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(machine.time, clock, lambda: 1e-11 * time_now[0])
    machine.is_bfloat16_faster.cache_clear()
    yield set_up
    machine.is_bfloat16_faster.cache_clear()


@pytest.mark.parametrize(("slower", "largest"), [(100.0, 64), (3.0, 128), (1.0, 256), (0.65, 512), (0.4, 256)])
def test_bfloat16_is_left_where_it_is_clearly_behind(counted, slower: float, largest: int):
    calls = counted(slower)
    assert choose_dtype("auto", on_cpu=True) == (torch.bfloat16 if slower < 1 / 1.5 else torch.float32)
    assert max(size for _, size in calls) == largest
    # What is far behind is called no more.
    n_calls = 2 if slower > 2 else 1 + machine.FEWEST_ROUNDS
    assert calls["bfloat16", largest] == n_calls
    choose_dtype("auto", on_cpu=True)  # measured once: a run does not change its precision
    assert calls["bfloat16", largest] == n_calls
    assert slower < 1 or calls["float32", largest] == 1 + machine.FEWEST_ROUNDS


@pytest.mark.parametrize(("slower", "largest"), [(100.0, 128), (1.0, 512)])
def test_a_rate_is_that_of_the_largest_product_that_is_fast_enough(counted, slower: float, largest: int):
    calls = counted(slower)
    assert product_rate(torch.bfloat16) == pytest.approx(4e11 / slower)
    assert max(size for _, size in calls) == largest


def test_calls_that_are_far_behind_are_measured_no_more(monkeypatch):
    seconds = {"slow": 3.0, "fast": 1.0, "near": 1.5}
    calls: Counter[str] = Counter()
    time_now = [0.0]

    def call(name: str) -> None:
        calls[name] += 1
        time_now[0] += seconds[name] * (10 if calls[name] == 1 else 1)  # the first call is slower

    for clock in ("thread_time", "perf_counter"):
        monkeypatch.setattr(machine.time, clock, lambda: time_now[0])
    assert race({name: partial(call, name) for name in seconds}) == pytest.approx(seconds)
    assert calls == {"slow": 2, "fast": 4, "near": 4}
