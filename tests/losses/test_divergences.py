"""Every divergence against a float64 textbook, far from and near to the teacher."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.losses.divergences import Divergence
from llmctl.tables.losses import DIVERGENCES

NAMES = list(DIVERGENCES)


def textbook(name: str, z_s: torch.Tensor, z_t: torch.Tensor, options: Divergence) -> torch.Tensor:
    """Return a divergence of logits per row, in the words of its paper."""
    q, p = z_s.softmax(-1), z_t.softmax(-1)

    def kl(a, b):
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1)

    if name == "fkl":
        return kl(p, q)
    if name == "rkl":
        return kl(q, p)
    if name == "jsd":
        m = options.beta * p + (1 - options.beta) * q
        return options.beta * kl(p, m) + (1 - options.beta) * kl(q, m)
    if name == "skl":
        return kl(p, options.skew * p + (1 - options.skew) * q)
    if name == "srkl":
        return kl(q, (1 - options.skew) * p + options.skew * q)
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "taid":
        target = ((1 - options.taid_share) * z_s.detach() + options.taid_share * z_t).softmax(-1)
        return kl(target, q)
    rows = []
    for own, told in zip(q, p, strict=True):  # akl, token by token
        head, mass = set(), 0.0
        for token in told.argsort(descending=True).tolist():
            if mass >= options.head_mass:
                break
            head.add(token)
            mass += float(told[token])
        gaps = (told - own).abs().detach()
        share = sum(float(gaps[token]) for token in head) / float(gaps.sum())
        rows.append(share * kl(told, own) + (1 - share) * kl(own, told))
    return torch.stack(rows)


def logits(scale: float, gap: float, *, rows: int = 6, words: int = 37, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    z_t = scale * torch.randn(rows, words, generator=generator, dtype=torch.float64)
    return z_t + gap * torch.randn(rows, words, generator=generator, dtype=torch.float64), z_t


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("scale", "gap"), [(1.0, 1.0), (4.0, 3.0), (1.0, 0.01), (12.0, 0.1)])
def test_values_and_gradients_are_those_of_the_textbook(name, scale, gap):
    options = Divergence(name, beta=0.3, skew=0.2, head_mass=0.4, taid_share=0.6)
    z_s, z_t = logits(scale, gap)
    z_s.requires_grad_()
    expected = textbook(name, z_s, z_t, options)
    (gradient,) = torch.autograd.grad(expected.sum(), z_s)
    found, error = options(z_s.detach().log_softmax(-1), z_t.log_softmax(-1))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(error, gradient, rtol=1e-9, atol=1e-14)
    narrow, narrow_error = options(z_s.detach().log_softmax(-1).float(), z_t.log_softmax(-1).float())
    bound = 1e-5 if gap >= 1 else 3e-4  # what float32 leaves of a small difference
    assert float((narrow_error.double() - gradient).norm() / gradient.norm()) < bound
    assert float((narrow.double() - expected.detach()).abs().amax()) < 1e-5


@pytest.mark.parametrize("name", ["fkl", "rkl", "taid"])
def test_next_to_the_teacher_a_loss_is_no_noise(name):
    z_s, z_t = logits(2.0, 1e-3, rows=4, words=32000)
    options = Divergence(name, taid_share=0.7)
    expected = textbook(name, z_s, z_t, options)
    found, _ = options(z_s.float().log_softmax(-1), z_t.float().log_softmax(-1))
    assert float(((found.double() - expected) / expected).abs().max()) < 0.02
    assert (found >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_where_the_two_are_equal(name):
    z, _ = logits(5.0, 0.0, words=1000)
    log_p = z.float().log_softmax(-1)
    found, error = Divergence(name, taid_share=0.7)(log_p.clone(), log_p.clone())
    assert torch.equal(found, torch.zeros_like(found))
    assert torch.equal(error, torch.zeros_like(error))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_is_finite(name):
    """Probabilities that are nothing in float32 on one side, on the other, on both."""
    log_q = torch.tensor([[0.0, -300.0, -400.0, 0.0], [-300.0, 0.0, -400.0, -1.0]]).log_softmax(-1)
    log_p = torch.tensor([[-300.0, 0.0, -400.0, 0.0], [-300.0, 0.0, -400.0, -300.0]]).log_softmax(-1)
    found, error = Divergence(name, taid_share=0.5)(log_q, log_p)
    assert torch.isfinite(found).all()
    assert torch.isfinite(error).all()


@given(st.integers(0, 10**6), st.floats(0.1, 8.0), st.floats(0.0, 4.0), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_bounds(seed, scale, gap, share):
    z_s, z_t = logits(scale, gap, seed=seed, rows=3, words=11)
    for name in NAMES:
        options = Divergence(name, beta=share, skew=share, head_mass=share, taid_share=share)
        found, error = options(z_s.log_softmax(-1), z_t.log_softmax(-1))
        assert (found >= -1e-12).all(), name
        # Moving all logits together changes nothing.
        assert error.sum(-1).abs().amax() < 1e-9, name
        if name == "jsd":
            assert (found <= math.log(2)).all()
        if name == "tvd":
            assert (found <= 1).all()


def test_every_divergence_has_a_source():
    assert all("arXiv" in row.source for row in DIVERGENCES.values())
