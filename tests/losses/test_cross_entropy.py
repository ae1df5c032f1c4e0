"""The chunked loss equals the textbook one: value, gradients, in any chunk size, with and without a bias."""

import math

import pytest
import torch
from torch.nn import functional as F

from llmctl.losses import logits as logits_module
from llmctl.losses.cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Logits are processed two rows at a time, as with a large vocabulary."""
    monkeypatch.setattr(logits_module, "CACHED_FLOATS", 128)


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(53, 16, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(53, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 53, (37,), generator=generator)
    return hidden, weight, bias, labels


@pytest.mark.parametrize("chunk_tokens", [1, 10, 37, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_equals_unchunked(chunk_tokens: int, with_bias: bool):
    hidden, weight, bias, labels = problem()
    used = [hidden, weight, bias] if with_bias else [hidden, weight]
    total, correct = linear_cross_entropy(
        hidden, weight, labels, bias_V=bias if with_bias else None, chunk_tokens=chunk_tokens
    )
    got = torch.autograd.grad(total * 0.3, used)
    logits = hidden @ weight.T + (bias if with_bias else 0)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.3, used)
    assert math.isclose(total.item(), expected.item(), rel_tol=1e-6)
    assert correct.item() == (logits.argmax(1) == labels).sum().item()
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_capped_logits_equal_dense_autograd(smoothing: float):
    hidden, weight, bias, labels = problem(torch.float64)
    used = [hidden, weight, bias]
    total, _ = linear_cross_entropy(
        hidden, weight, labels, bias_V=bias, chunk_tokens=10, label_smoothing=smoothing, softcap=3.0
    )
    logits = 3.0 * torch.tanh((hidden @ weight.T + bias) / 3.0)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(total, expected)
    for ours, theirs in zip(torch.autograd.grad(total, used), torch.autograd.grad(expected, used), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equals_a_float64_loop():
    hidden, weight, bias, labels = problem()
    total, _ = linear_cross_entropy(hidden, weight, labels, bias_V=bias)
    nats = 0.0
    for row, label in zip(hidden.double().tolist(), labels.tolist(), strict=True):
        scores = [sum(map(float.__mul__, row, w)) + b for w, b in zip(weight.tolist(), bias.tolist(), strict=True)]
        nats += math.log(sum(map(math.exp, scores))) - scores[label]
    assert math.isclose(total.item(), nats, rel_tol=1e-6)


def test_sums_add_up_over_parts():
    hidden, weight, _, labels = problem()
    whole, _ = linear_cross_entropy(hidden, weight, labels)
    parts = [linear_cross_entropy(hidden[rows], weight, labels[rows])[0] for rows in (slice(0, 20), slice(20, None))]
    assert math.isclose(whole.item(), sum(parts).item(), rel_tol=1e-6)


def test_autocast_computes_in_its_precision_and_returns_gradients_in_the_parameters():
    hidden, weight, _, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    exact = F.cross_entropy(hidden.detach() @ weight.detach().T, labels, reduction="sum")
    assert math.isclose(total.item(), exact.item(), rel_tol=1e-2)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_without_gradients_the_value_is_the_same_and_nothing_is_multiplied_back():
    hidden, weight, bias, labels = problem()
    kept, _ = linear_cross_entropy(hidden, weight, labels, bias_V=bias, chunk_tokens=10)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, torch.autograd.profiler.profile() as profile:
            total, _ = linear_cross_entropy(hidden, weight, labels, bias_V=bias, chunk_tokens=10)
        assert total.item() == kept.item()
        products = [event for event in profile.function_events if event.name in ("aten::mm", "aten::addmm_")]
        assert len(products) == 4, "one product per chunk"


def test_far_logits_neither_overflow_nor_vanish():
    hidden = torch.eye(2).requires_grad_()
    weight = torch.tensor([[300.0, -300.0], [-300.0, 300.0], [0.0, 0.0]]).requires_grad_()
    labels = torch.tensor([1, 1])
    total, correct = linear_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert total.item() == expected.item() == 600
    assert correct.item() == 1
    for ours, theirs in zip(
        torch.autograd.grad(total, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_no_labels_cost_nothing():
    hidden, weight, _, labels = problem()
    total, correct = linear_cross_entropy(hidden[:0], weight, labels[:0])
    total.backward()
    assert total.item() == correct.item() == 0


@pytest.mark.parametrize("chunk_tokens", [10, 1000])
def test_smoothed_labels_are_those_of_the_textbook(chunk_tokens: int):
    hidden, weight, bias, labels = problem()
    total, correct = linear_cross_entropy(
        hidden, weight, labels, bias_V=bias, chunk_tokens=chunk_tokens, label_smoothing=0.1
    )
    got = torch.autograd.grad(total, [hidden, weight, bias])
    logits = hidden @ weight.T + bias
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    assert math.isclose(total.item(), expected.item(), rel_tol=1e-6)
    assert correct.item() == (logits.argmax(1) == labels).sum().item()
    for ours, theirs in zip(got, torch.autograd.grad(expected, [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
