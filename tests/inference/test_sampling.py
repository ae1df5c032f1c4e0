"""Every filter against its definition in plain Python, and draws that follow the probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.config import GenerateConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.inference import sampling
from llmctl.inference.settings import check

logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def kept(row: torch.Tensor) -> set[int]:
    return {index for index, value in enumerate(row.tolist()) if value > -math.inf}


@given(logits, st.integers(0, 15))
def test_top_k_keeps_the_k_likeliest_and_ties(values: list[float], k: int):
    row = sampling.keep_top_k(torch.tensor([values]), k)[0]
    threshold = sorted(values, reverse=True)[min(k, len(values)) - 1] if k else -math.inf
    assert kept(row) == {index for index, value in enumerate(values) if value >= threshold}


@given(logits, st.floats(0.01, 1.0))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(values: list[float], p: float):
    row = sampling.keep_top_p(torch.tensor([values], dtype=torch.float64), p)[0]
    order = sorted(range(len(values)), key=lambda index: -values[index])
    probabilities = softmax(values)
    expected: set[int] = set()
    total = 0.0
    for index in order:
        if total >= p - 1e-9 and total >= p:
            break
        expected.add(index)
        total += probabilities[index]
    got = kept(row)
    assert got
    # Sums that meet p to the last digit may fall on either side.
    assert got == expected or abs(sum(probabilities[i] for i in expected - {order[len(expected) - 1]}) - p) < 1e-6


@given(logits, st.floats(0.0, 1.0))
@settings(deadline=None)
def test_min_p_compares_with_the_best(values: list[float], min_p: float):
    row = sampling.keep_min_p(torch.tensor([values], dtype=torch.float64), min_p)[0]
    probabilities = softmax(values)
    sure = {index for index, p in enumerate(probabilities) if p > min_p * max(probabilities) * (1 + 1e-6)}
    possible = {index for index, p in enumerate(probabilities) if p >= min_p * max(probabilities) * (1 - 1e-6)}
    assert sure <= kept(row) <= possible
    assert kept(row)


def test_repetition_makes_seen_tokens_less_likely():
    row = sampling.penalize_repetition(
        torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]]), penalty=2.0
    )
    assert row.tolist() == [[1.0, -4.0, 3.0]]


def test_draws_follow_the_probabilities_and_the_seed():
    values = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    config = GenerateConfig(temperature=0.7)
    n = 4000
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    drawn = sampling.choose(values.expand(n, 4), None, config, generators)
    counts = torch.bincount(drawn, minlength=4) / n
    expected = torch.tensor(softmax([value / 0.7 for value in values[0].tolist()]))
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.03)
    again = sampling.choose(values, None, config, [torch.Generator().manual_seed(17)])
    assert again.item() == drawn[17].item()


def reference(values: list[float], seen: list[bool], config: GenerateConfig) -> list[float]:
    """The distribution of the next token, filter after filter in float64; ties are kept whole by top-k."""
    penalized = [
        (v / config.repetition_penalty if v > 0 else v * config.repetition_penalty) if s else v
        for v, s in zip(values, seen, strict=True)
    ]
    p = softmax([value / config.temperature for value in penalized])

    def only(indexes: set[int]) -> list[float]:
        total = sum(p[i] for i in indexes)
        return [p[i] / total if i in indexes else 0.0 for i in range(len(p))]

    if config.top_k:
        threshold = sorted(p, reverse=True)[min(config.top_k, len(p)) - 1]
        p = only({i for i, value in enumerate(p) if value >= threshold})
    if config.top_p < 1:
        order = sorted(range(len(p)), key=lambda i: -p[i])
        sums = [sum(p[i] for i in order[:n]) for n in range(len(p))]
        p = only({i for i, before in zip(order, sums, strict=True) if before < config.top_p})
    if config.min_p:
        p = only({i for i, value in enumerate(p) if value >= config.min_p * max(p)})
    return p


def test_all_filters_together_draw_as_their_definitions_say():
    values, seen = [2.0, 1.7, 1.5, 0.1, -0.4, -1.0, 2.4], [False, False, True, False, True, False, True]
    config = GenerateConfig(temperature=1.3, top_k=5, top_p=0.85, min_p=0.1, repetition_penalty=1.4)
    n = 4000
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    drawn = sampling.choose(torch.tensor([values]).expand(n, 7), torch.tensor([seen]).expand(n, 7), config, generators)
    expected = reference(values, seen, config)
    assert 0.0 in expected
    counts = torch.bincount(drawn, minlength=7) / n
    torch.testing.assert_close(counts, torch.tensor(expected), rtol=0, atol=0.03)
    assert not counts[[i for i, p in enumerate(expected) if p == 0]].any()


@given(
    st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=12),
    st.floats(0.01, 3.0),
    st.integers(0, 12),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_whatever_is_asked_a_token_with_some_probability_is_drawn(values, temperature, top_k, top_p, min_p, seed):
    config = GenerateConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    padded = torch.tensor([[*values, -math.inf, -math.inf]])
    (index,) = sampling.choose(padded, None, config, [torch.Generator().manual_seed(seed)]).tolist()
    assert index < len(values)
    assert values[index] == max(values) or temperature >= (max(values) - values[index]) / 110


def test_excluded_tokens_are_never_drawn():
    values = torch.tensor([[5.0, 4.0, 3.0, 2.0]]).expand(500, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(500)]
    drawn = sampling.choose(values, None, GenerateConfig(temperature=3.0, top_k=2), generators)
    assert set(drawn.tolist()) == {0, 1}


def test_all_wrong_settings_are_named_together():
    config = GenerateConfig(max_tokens=0, temperature=-1, top_k=-1, top_p=0, min_p=2, repetition_penalty=0, beams=0)
    with pytest.raises(UsageError) as caught:
        check(config)
    for name in ("max-tokens", "temperature", "top-k", "top-p", "min-p", "repetition-penalty", "beams"):
        assert f"--{name}" in str(caught.value)


def test_a_search_and_settings_of_draws_exclude_each_other():
    config = GenerateConfig(beams=4, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1)
    with pytest.raises(UsageError) as caught:
        check(config)
    for name in ("top-k", "top-p", "min-p", "repetition-penalty"):
        assert f"`--{name}` has no effect" in str(caught.value)
    check(GenerateConfig(beams=4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"])
def test_settings_that_are_no_numbers_are_refused(name: str, value: float):
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        check(GenerateConfig(**{name: value}))


@pytest.mark.parametrize("temperature", [1e-50, 1e-45, 1e-30, 1e-3])
def test_cold_draws_are_greedy(temperature: float):
    values = torch.tensor([[1.0, 3.0, -math.inf, 2.0], [-5.0, -9.0, -4.0, -math.inf]])
    config = GenerateConfig(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert sampling.choose(values, None, config, generators).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature: float):
    values = torch.tensor([[1.0, 2.0], [1.0, math.nan]])
    generators = [torch.Generator(), torch.Generator()]
    with pytest.raises(ArtifactError, match="not finite"):
        sampling.choose(values, None, GenerateConfig(temperature=temperature), generators)
