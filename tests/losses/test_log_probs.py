"""Chunked log probabilities equal the textbook ones: values and gradients, whatever the loss makes of each."""

import pytest
import torch

from llmctl.losses import logits as logits_module
from llmctl.losses.cross_entropy import linear_cross_entropy
from llmctl.losses.log_probs import linear_log_probs
from tests.losses.test_cross_entropy import problem


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Logits are processed two rows at a time, as with a large vocabulary."""
    monkeypatch.setattr(logits_module, "CACHED_FLOATS", 128)


@pytest.mark.parametrize("chunk_tokens", [1, 10, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_equals_dense_autograd(chunk_tokens, softcap, with_bias):
    hidden, weight, bias, labels = problem(torch.float64)
    used = [hidden, weight, bias] if with_bias else [hidden, weight]
    found = linear_log_probs(
        hidden, weight, labels, bias_V=bias if with_bias else None, chunk_tokens=chunk_tokens, softcap=softcap
    )
    logits = hidden @ weight.T + (bias if with_bias else 0)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected)
    slopes = torch.linspace(-2, 3, len(labels), dtype=torch.float64)
    ours = torch.autograd.grad((slopes * found).sum(), used)
    theirs = torch.autograd.grad((slopes * expected).sum(), used)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same():
    hidden, weight, bias, labels = problem()
    wanted = torch.autograd.grad(linear_log_probs(hidden, weight, labels).sum(), hidden)[0]
    frozen = weight.detach()
    found = torch.autograd.grad(linear_log_probs(hidden, frozen, labels).sum(), hidden)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    total, _ = linear_cross_entropy(hidden, frozen, labels, bias_V=bias)
    other, _ = linear_cross_entropy(hidden, weight, labels, bias_V=bias)
    torch.testing.assert_close(
        torch.autograd.grad(total, [hidden, bias]), torch.autograd.grad(other, [hidden, bias]), rtol=0, atol=0
    )


def test_bfloat16_is_accumulated_in_float32():
    hidden, weight, _, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_log_probs(hidden, weight, labels)
    exact = linear_log_probs(hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
