import pytest
import torch

from llmctl.quant.factors import best_factors, lost_by
from llmctl.quant.methods import Moments, gptq, method_of, nearest
from llmctl.quant.schemes import SCHEMES
from tests.quant.test_methods import moments, weight

SCHEME = SCHEMES["int4"]


def outlying() -> Moments:
    """Return moments of inputs of which some are far larger than the others."""
    found = Moments.empty(128)
    sizes = torch.where(torch.arange(128) % 16 == 0, 30.0, 1.0)
    found.add(torch.randn(512, 128, generator=torch.Generator().manual_seed(3)) * sizes)
    return found


def test_inputs_that_stand_out_get_finer_columns():
    factors = best_factors([weight()], [SCHEME], outlying(), share=lambda one: one)
    assert factors is not None
    assert factors[::16].min() > factors[1::16].max()
    ones = torch.ones_like(factors)
    assert lost_by(weight(), SCHEME, outlying(), factors) < lost_by(weight(), SCHEME, outlying(), ones)


@pytest.mark.parametrize("name", ["awq", "awq-gptq"])
@pytest.mark.parametrize("inputs", [moments, outlying])
def test_factors_are_taken_only_where_the_method_itself_loses_less(name, inputs):
    method = method_of(name)
    factors = best_factors([weight()], [SCHEME], inputs(), share=lambda one: one, method=method)
    if factors is not None:
        ones = torch.ones_like(factors)
        with_them, without = (lost_by(weight(), SCHEME, inputs(), one, method) for one in (factors, ones))
        assert with_them < without


def test_what_gptq_makes_up_for_is_left_to_it():
    sought = best_factors([weight()], [SCHEME], moments(), share=lambda one: one, method=nearest)
    assert sought is not None
    ones = torch.ones_like(sought)
    worse = lost_by(weight(), SCHEME, moments(), sought, gptq) > lost_by(weight(), SCHEME, moments(), ones, gptq)
    taken = best_factors([weight()], [SCHEME], moments(), share=lambda one: one, method=gptq)
    assert (taken is None) == worse
