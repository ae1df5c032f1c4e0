"""Losses on preferences against the formulas of their papers, written out with exponentials."""

import math

import pytest
import torch

from llmctl.losses.preferences import Answers, Preference, log1mexp
from llmctl.tables.preferences import PREFERENCES


def answers(log_prob: float, reference: float = 0.0, mean: float = -0.4) -> Answers:
    return Answers(*(torch.tensor([value], dtype=torch.float64) for value in (log_prob, reference, mean)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CHOSEN, REJECTED = answers(-3.0, -4.0), answers(-7.0, -6.5, -0.9)


def test_dpo_is_minus_the_log_of_the_probability_of_the_preference():
    # Bradley-Terry of implicit rewards beta log(pi / ref): eq. 6 and 7 of the paper.
    chosen, rejected = math.exp(0.3 * (-3.0 + 4.0)), math.exp(0.3 * (-7.0 + 6.5))
    expected = -math.log(chosen / (chosen + rejected))
    assert float(Preference("dpo", 0.3).of_pairs(CHOSEN, REJECTED)) == pytest.approx(expected, rel=1e-12)
    smoothed = 0.8 * expected - 0.2 * math.log(rejected / (chosen + rejected))
    found = Preference("dpo", 0.3, label_smoothing=0.2).of_pairs(CHOSEN, REJECTED)
    assert float(found) == pytest.approx(smoothed, rel=1e-12)


def test_ipo_simpo_orpo():
    assert float(Preference("ipo", 0.25).of_pairs(CHOSEN, REJECTED)) == pytest.approx((1.0 + 0.5 - 2.0) ** 2)
    chosen, rejected = answers(-0.4, mean=-0.4), answers(-0.9, mean=-0.9)
    expected = -math.log(sigmoid(2 * (-0.4 + 0.9) - 0.3))
    assert float(Preference("simpo", 2.0, gamma=0.3).of_pairs(chosen, rejected)) == pytest.approx(expected)
    p, q = math.exp(-0.4), math.exp(-0.9)
    odds = (p / (1 - p)) / (q / (1 - q))
    expected = 0.4 - 0.2 * math.log(sigmoid(math.log(odds)))
    assert float(Preference("orpo", 0.2).of_pairs(chosen, rejected)) == pytest.approx(expected)


def test_kto_weighs_desirable_and_undesirable_answers():
    both = Answers(*(torch.cat([one, one]) for one in (CHOSEN.log_probs_P, CHOSEN.reference_P, CHOSEN.means_P)))
    options = Preference("kto", 0.5, desirable=2.0, undesirable=3.0)
    found = options.of_answers(both, torch.tensor([True, False]), torch.tensor(0.4, dtype=torch.float64))
    expected = [2 * (1 - sigmoid(0.5 * 0.6)), 3 * (1 - sigmoid(-0.5 * 0.6))]
    assert found.tolist() == pytest.approx(expected)


def test_log1mexp_near_zero_and_far_from_it():
    x = torch.tensor([-1e-12, -1e-3, -0.5, -0.7, -30.0, -800.0, 0.0], dtype=torch.float64, requires_grad=True)
    found = log1mexp(x)
    expected = [math.log(-math.expm1(value)) for value in x.tolist()[:5]] + [-math.exp(-800.0)]
    assert found.tolist()[:6] == pytest.approx(expected, rel=1e-12)
    found.sum().backward()
    assert found.isfinite().all()
    assert x.grad is not None
    assert x.grad[:6].isfinite().all()


def test_every_loss_falls_with_a_larger_margin():
    for name, row in PREFERENCES.items():
        if not row.is_paired:
            continue
        loss = Preference(name, 0.2)
        better = loss.of_pairs(answers(-0.3), answers(-1.5))
        worse = loss.of_pairs(answers(-0.3), answers(-0.8))
        assert float(better) < float(worse), name
