"""Attention against a textbook loop in float64: masks, bands, documents, grouped heads, biased scores."""

import itertools
import math

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.attention import Attention, Mask, attend, blocks_pay, build_mask
from llmctl.model.blocked import BLOCK, blocked_attention, share_of, spans_of
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
def test_queries_and_keys_are_normalized_per_head(eps):
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


LONG = 2 * BLOCK + 5
MASKS = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": False, "window": 9},
    "causal window": {"causal": True, "window": 70},
    "documents": {"causal": False, "documents": True},
    "causal documents": {"causal": True, "documents": True},
    "bias": {"causal": False, "bias": True},
    "causal bias": {"causal": True, "bias": True},
    "causal bias and documents": {"causal": True, "bias": True, "documents": True},
}


def long_mask(rows, heads, n_queries, n_keys, dtype, *, causal, window=0, documents=False, bias=False):
    """Return a mask of rows of several documents and padding, and the learned bias in it if there is one."""
    numbers = None
    if documents:
        starts = torch.rand(rows, n_keys, generator=torch.Generator().manual_seed(2)) < 0.02
        numbers = starts.long().cumsum(1) + 1
        numbers[-1, -7:] = 0
    draw = torch.randn(heads, n_queries, n_keys, dtype=dtype, generator=torch.Generator().manual_seed(3))
    learned = draw.requires_grad_() if bias else None
    mask = build_mask(
        n_queries,
        n_keys,
        causal=causal,
        window=window,
        query_documents_BT=None if numbers is None else numbers[:, -n_queries:],
        key_documents_BS=numbers,
        bias_NTS=learned,
    )
    return mask, learned


def both_ways(mask, learned, q, k, v):
    """Return outputs and gradients, in blocks and through scaled_dot_product_attention."""
    inputs = [x for x in (q, k, v, learned) if x is not None]
    y = blocked_attention(q, k, v, mask.summand(q.dtype), mask.spans, is_causal=mask.is_causal, scale=SCALE)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.tensor, is_causal=mask.is_causal, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    weights = torch.randn(wanted.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(4))
    got, expected = (torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True) for out in (y, wanted))
    return [y, *got], [wanted, *expected]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(LONG, LONG), (BLOCK, BLOCK), (9, 9), (9, LONG)])
def test_blocks_equal_the_fused_kernel(name, dtype, tolerance, heads, n_queries, n_keys):
    if name == "causal" and n_queries != n_keys:
        pytest.skip("is_causal is for queries and keys of one length")
    generator = torch.Generator().manual_seed(5)
    shapes = [(3, heads[0], n_queries, 8), (3, heads[1], n_keys, 8), (3, heads[1], n_keys, 8)]
    q, k, v = (torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes)
    mask, learned = long_mask(3, heads[0], n_queries, n_keys, dtype, **MASKS[name])
    for ours, theirs in zip(*both_ways(mask, learned, q, k, v), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_scores", [1, 4 * BLOCK * LONG * 2])
def test_rows_worked_on_together_change_nothing(monkeypatch, chunk_scores):
    monkeypatch.setattr("llmctl.model.blocked.CHUNK_SCORES", chunk_scores)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(3, 4, LONG, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    mask, learned = long_mask(3, 4, LONG, LONG, torch.float64, causal=True, documents=True)
    for ours, theirs in zip(*both_ways(mask, learned, q, k, v), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_spans_leave_out_what_no_query_of_a_block_may_see():
    documents = torch.tensor([[1] * BLOCK + [2] * BLOCK, [1] * (BLOCK + 10) + [2] * (BLOCK - 10)])
    T = 2 * BLOCK
    mask = build_mask(T, T, causal=True, query_documents_BT=documents, key_documents_BS=documents)
    assert mask.spans == [[(0, BLOCK), (BLOCK, T)], [(0, BLOCK), (0, T)]]
    assert share_of(mask.spans, T) == 5 / 8
    assert spans_of(build_mask(T, T, causal=False).tensor or torch.zeros(T, T)) == [[(0, T), (0, T)]]
    window = build_mask(T, T, causal=False, window=10)
    assert window.spans == [[(0, BLOCK + 9), (BLOCK - 9, T)]]


def test_choice_follows_sizes_dtype_and_mask():
    def pays(n_keys, mask, dtype=torch.float32):
        return blocks_pay(n_keys, mask, dtype)

    short, long = (torch.arange(n)[None] // 32 for n in (256, 1024))
    packed = lambda numbers: build_mask(
        numbers.shape[1], numbers.shape[1], causal=True, query_documents_BT=numbers + 1, key_documents_BS=numbers + 1
    )
    assert pays(256, packed(short))
    assert not pays(256, packed(torch.zeros_like(short)))
    assert not pays(128, packed(short[:, :128]))
    assert pays(256, packed(short), torch.bfloat16)
    assert pays(1024, packed(long))
    assert not pays(1024, packed(torch.zeros_like(long)))
    assert pays(512, Mask(is_causal=True))
    assert not pays(256, Mask(is_causal=True))
    assert not pays(1024, Mask(is_causal=True))
    assert not pays(512, Mask())
    assert pays(512, Mask(is_causal=True), torch.bfloat16)
    assert not pays(512, Mask(), torch.bfloat16)
    assert pays(512, Mask(torch.zeros(1, 512, 512, requires_grad=True)))
    assert not pays(256, Mask(torch.zeros(1, 256, 256, requires_grad=True)), torch.bfloat16)


@pytest.mark.parametrize("fields", [{}, {"n_kv_heads": 2, "qk_norm": True}])
def test_autocast_computes_blocks_in_its_precision(fields):
    attention = layer(**fields).float()
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(6))
    mask = build_mask(40, 40, causal=True)
    exact = torch.autograd.grad(attention(x, mask).pow(2).sum(), list(attention.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x, mask)
        grads = torch.autograd.grad(y.float().pow(2).sum(), list(attention.parameters()))
    assert y.dtype == torch.bfloat16
    for ours, theirs in zip(grads, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
