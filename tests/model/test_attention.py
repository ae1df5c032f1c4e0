"""Attention against a textbook loop in float64: masks, bands, documents, grouped heads, biased scores."""

import itertools
import math

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.attention import Attention, attend, build_mask
from llmctl.model.shapes import complete

B, N, K, T, H = 2, 4, 2, 7, 6
SCALE = 0.37


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(B, heads, T, H, dtype=torch.float64, generator=generator)
    return draw(N), draw(K), draw(K)


def textbook(q, k, v, allowed, bias=None):
    """softmax over the allowed keys, one query at a time, in plain Python floats."""
    out = torch.zeros(B, q.shape[2], N * H, dtype=torch.float64)
    for b, n, t in itertools.product(range(B), range(N), range(q.shape[2])):
        group = n // (N // K)
        keys = [s for s in range(k.shape[2]) if allowed(b, t, s)]
        scores = [
            SCALE * sum(x * y for x, y in zip(q[b, n, t].tolist(), k[b, group, s].tolist(), strict=True))
            + (0 if bias is None else bias[n, t, s].item())
            for s in keys
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(keys, weights, strict=True):
            out[b, t, n * H : (n + 1) * H] += weight / sum(weights) * v[b, group, s]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_attention_equals_the_textbook_loop(qkv, causal, window, packed, biased):
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 3, 3, 3, 4]]) if packed else None
    bias = torch.randn(N, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if biased else None

    def allowed(b, t, s):
        near = not window or abs(t - s) < window
        same = documents is None or documents[b, t] == documents[b, s]
        return near and same and (s <= t or not causal)

    mask = build_mask(
        T, T, causal=causal, window=window, query_documents_BT=documents, key_documents_BS=documents, bias_NTS=bias
    )
    torch.testing.assert_close(attend(*qkv, mask, SCALE), textbook(*qkv, allowed, bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("window", [0, 2])
def test_last_queries_see_what_they_saw_in_the_whole(qkv, n_queries, window):
    q, k, v = qkv
    whole = attend(q, k, v, build_mask(T, T, causal=True, window=window), SCALE)
    last = attend(q[:, :, -n_queries:], k, v, build_mask(n_queries, T, causal=True, window=window), SCALE)
    torch.testing.assert_close(last, whole[:, -n_queries:], rtol=0, atol=1e-12)


def test_padding_queries_are_finite_and_padding_keys_unseen(qkv):
    documents = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]])
    for causal, window in itertools.product((True, False), (0, 2)):
        mask = build_mask(T, T, causal=causal, window=window, query_documents_BT=documents, key_documents_BS=documents)
        assert mask.tensor.any(dim=-1).all(), "a row without any key has no softmax"
        assert not (mask.tensor[:, 0] & (documents[:, None, :] == 0) & (documents[:, :, None] == 1)).any()
        assert torch.isfinite(attend(*qkv, mask, SCALE)).all()


def test_padding_of_a_target_sees_all_of_its_source():
    target, source = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 1, 2, 2]])
    mask = build_mask(3, 4, causal=False, query_documents_BT=target, key_documents_BS=source)
    assert mask.tensor.int().tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]]]


@pytest.mark.parametrize("n_queries", [1, 4])
def test_no_mask_is_made_where_none_is_needed(n_queries):
    assert build_mask(n_queries, n_queries, causal=True).tensor is None
    assert build_mask(1, 9, causal=True).tensor is None
    assert build_mask(n_queries, 9, causal=False).tensor is None
    assert build_mask(4, 4, causal=True).is_causal


def test_padding_query_over_a_memory_without_padding_is_finite(qkv):
    queries, keys = torch.tensor([[1, 1, 0, 0, 0, 0, 0]] * B), torch.ones(B, T, dtype=torch.long)
    mask = build_mask(T, T, causal=False, query_documents_BT=queries, key_documents_BS=keys)
    assert mask.tensor.all()
    assert torch.isfinite(attend(*qkv, mask, SCALE)).all()


def layer(**fields):
    config = complete(ModelConfig(vocab_size=2, d_model=24, n_heads=4, **fields))
    torch.manual_seed(0)
    return Attention(config).double()


def test_grouped_queries_equal_repeated_heads():
    grouped, full = layer(n_kv_heads=2, attention_bias=True), layer(attention_bias=True)
    state = grouped.state_dict()
    for name, tensor in state.items():
        if name.startswith(("k_proj", "v_proj")):
            heads = tensor.unflatten(0, (2, 6))
            state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    mask = build_mask(5, 5, causal=True)
    torch.testing.assert_close(grouped(x, mask), full(x, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-5, 0.7])
def test_queries_and_keys_are_normalised_per_head(eps):
    attention = layer(qk_norm=True, norm_eps=eps)
    torch.nn.init.normal_(attention.q_norm.weight)
    torch.nn.init.normal_(attention.k_norm.weight)
    x = torch.randn(2, 5, 24, dtype=torch.float64)

    def heads(projection, norm):
        y = projection(x).view(2, 5, 4, 6)
        if norm is not None:
            y = y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight
        return y.transpose(1, 2)

    q, k = heads(attention.q_proj, attention.q_norm), heads(attention.k_proj, attention.k_norm)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(6)).softmax(-1)
    wanted = attention.o_proj((weights @ heads(attention.v_proj, None)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, build_mask(5, 5, causal=False)), wanted, rtol=0, atol=1e-12)
