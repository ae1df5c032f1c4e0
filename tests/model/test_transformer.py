"""Equalities of the core that hold for every family, position scheme and block: nothing here is a golden value."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from llmctl.config import ModelConfig
from llmctl.model.attention import build_mask
from llmctl.model.cache import KVCache
from llmctl.model.positions import relative_buckets
from llmctl.model.presets import FAMILIES
from llmctl.model.shapes import complete
from llmctl.model.stack import Block, Pass
from llmctl.model.transformer import LanguageModel, initialize, load_tensors

POST = {"norm": "layernorm", "norm_position": "post", "attention_bias": True, "mlp_bias": True, "gated": False}
VARIANTS = {
    "llama": {},
    "qwen3": {"qk_norm": True, "n_kv_heads": 2, "head_dim": 6},
    "multi-query": {"n_kv_heads": 1},
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "gated": False, "mlp_bias": True},
    "banded": {"attention_windows": (0, 3), "positions": "learned"},
    "all banded": {"attention_windows": (2,)},
    "relative": {"positions": "relative", "n_relative_buckets": 8, "max_relative_distance": 10},
    "relative banded": {"positions": "relative", "n_relative_buckets": 4, "max_relative_distance": 6}
    | {"attention_windows": (4, 0)},
    "2017": POST | {"positions": "sinusoidal", "activation": "relu", "embedding_scale": 4.0},
    "bert": POST | {"positions": "learned", "embedding_norm": True, "head_transform": True, "logits_bias": True},
    "bart": POST | {"positions": "learned", "position_offset": 2, "embedding_norm": True, "logits_bias": True},
    "no positions": {"positions": "none"},
    "mixture": {"n_experts": 4, "n_active_experts": 2, "normalized_experts": False},
}
DISTANCES = {"positions": "disentangled", "n_relative_buckets": 8, "max_relative_distance": 7}
ENCODERS = {
    "deberta": POST | DISTANCES | {"embedding_norm": True, "head_transform": True, "logits_bias": True},
    "deberta banded": DISTANCES | {"n_kv_heads": 2, "attention_windows": (0, 3)},
}
PAIRS = {"two vocabularies": POST | {"positions": "sinusoidal", "source_vocab_size": 29, "vocab_size": 31}}
QUERY = {
    "query layer": {"query_layer": True, "positions": "learned"},
    "query layer banded": {"query_layer": True, "attention_windows": (0, 0, 3), "n_layers": 2},
}


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture(params=VARIANTS | QUERY)
def decoder(request, build):
    return build(**(VARIANTS | QUERY)[request.param])


@pytest.fixture(params=VARIANTS | ENCODERS)
def encoder(request, build):
    return build(family="encoder", **(VARIANTS | ENCODERS)[request.param])


@pytest.fixture(
    params=[*(("decoder", name) for name in VARIANTS), *(("encoder", name) for name in VARIANTS | ENCODERS)],
    ids=" ".join,
)
def single(request, build):
    family, name = request.param
    return build(family=family, **(VARIANTS | ENCODERS)[name])


@pytest.fixture(params=VARIANTS | PAIRS)
def pair(request, build):
    return build(family="encoder_decoder", n_decoder_layers=3, **(VARIANTS | PAIRS)[request.param])


def cached(model, tokens, cuts, **inputs):
    """Return hidden states computed piece by piece over one cache."""
    cache = KVCache(model.config, tokens.shape[0], 40, dtype=torch.float64)
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        now = {name: tensor[:, start:stop] for name, tensor in inputs.items() if tensor is not None}
        pieces.append(model.hidden(tokens[:, start:stop], cache=cache, **now))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_token_is_the_weighted_sum_of_its_experts(build, normalized):
    mixture = build(n_experts=5, n_active_experts=3, normalized_experts=normalized).model.layers[0].mlp
    x_BTD = torch.randn(2, 4, mixture.router.weight.shape[1], dtype=torch.float64)
    got_BTD = mixture(x_BTD)
    for row, place in itertools.product(range(2), range(4)):
        x_D = x_BTD[row, place]
        shares = (mixture.router.weight @ x_D).softmax(0)
        best = shares.argsort(descending=True)[:3].tolist()
        total = sum(shares[e] for e in best) if normalized else 1
        close(got_BTD[row, place], sum(shares[e] / total * mixture.experts[e](x_D) for e in best))


def test_experts_without_tokens_have_a_gradient_in_training(build, ids):
    """DistributedDataParallel waits for the gradient of every parameter."""
    model = build(n_experts=8, n_active_experts=1).train()
    model(ids(1, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("cuts", [list(range(1, 11)), [4, 5, 6, 7, 8, 9, 10], [3, 7]])
def test_cached_decoding_equals_the_full_pass(decoder, ids, cuts):
    tokens = ids(2, 11)
    close(cached(decoder, tokens, cuts), decoder.hidden(tokens))


@pytest.mark.parametrize("cuts", [[7, 8, 9, 10], [2, 6, 9], [1, 3]])
def test_left_padded_rows_decode_like_single_rows(decoder, ids, cuts):
    tokens, documents = ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    documents[1, :4] = 0
    documents[2, :1] = 0
    hidden = cached(decoder, tokens, cuts, documents_BT=documents)
    for row, n_padding in enumerate([0, 4, 1]):
        close(hidden[row, n_padding:], decoder.hidden(tokens[row : row + 1, n_padding:])[0])


def test_padding_is_remembered_by_the_cache(decoder, ids):
    tokens, documents = ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    documents[1, :4] = 0
    cache = KVCache(decoder.config, 2, 40, dtype=torch.float64)
    decoder.hidden(tokens[:, :6], cache=cache, documents_BT=documents[:, :6])
    rest = torch.cat([decoder.hidden(tokens[:, t : t + 1], cache=cache) for t in range(6, 11)], dim=1)
    close(rest[0], decoder.hidden(tokens[:1])[0, 6:])
    close(rest[1], decoder.hidden(tokens[1:, 4:])[0, 2:])


def test_selected_rows_go_on_as_themselves(decoder, ids):
    tokens, documents = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    documents[1, :3] = 0
    cache = KVCache(decoder.config, 2, 40, dtype=torch.float64)
    decoder.hidden(tokens[:, :8], cache=cache, documents_BT=documents[:, :8])
    rows = torch.tensor([1, 1, 0])
    cache.select(rows)
    got = decoder.hidden(tokens[rows, 8:], cache=cache)[:, 0]
    alone = [decoder.hidden(tokens[:1])[0, -1], decoder.hidden(tokens[1:, 3:])[0, -1]]
    close(got, torch.stack([alone[1], alone[1], alone[0]]))


def test_what_follows_belongs_to_the_last_document(decoder, ids):
    tokens = ids(1, 11)
    cache = KVCache(decoder.config, 1, 40, dtype=torch.float64)
    decoder.hidden(tokens[:, :6], cache=cache, documents_BT=torch.tensor([[1, 1, 1, 2, 2, 2]]))
    rest = decoder.hidden(tokens[:, 6:], cache=cache)
    close(rest, decoder.hidden(tokens[:, 3:])[:, 3:])


def test_selected_pairs_keep_their_sources(pair, ids):
    source, target = ids(2, 6), ids(2, 5, seed=2)
    cache = KVCache(pair.config, 2, 10, dtype=torch.float64)
    pair.decode(target[:, :4], pair.encode(source), cache=cache)
    rows = torch.tensor([1, 0, 1])
    cache.select(rows)
    got = pair.decode(target[rows, 4:], None, cache=cache)[:, 0]
    close(got, pair.hidden(source, decoder_input_ids_BT=target)[rows, -1])


def test_packed_documents_equal_each_document_alone(single, ids):
    model, tokens = single, ids(2, 12)
    documents = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3, [1] * 2 + [2] * 9 + [0]])
    hidden = model.hidden(tokens, documents_BT=documents)
    for row in range(2):
        for document in range(1, int(documents[row].max()) + 1):
            inside = documents[row] == document
            close(hidden[row, inside], model.hidden(tokens[row : row + 1, inside])[0])


def test_packed_pairs_equal_each_pair_alone(pair, ids):
    source, target = ids(1, 10), ids(1, 8, seed=2)
    source_documents = torch.tensor([[1] * 4 + [2] * 5 + [0]])
    target_documents = torch.tensor([[1] * 3 + [2] * 4 + [0]])
    hidden = pair.hidden(
        source, documents_BT=source_documents, decoder_input_ids_BT=target, decoder_documents_BT=target_documents
    )
    for document in (1, 2):
        inside = target_documents[0] == document
        alone = pair.hidden(source[:, source_documents[0] == document], decoder_input_ids_BT=target[:, inside])
        close(hidden[:, inside], alone)


@pytest.mark.parametrize("left", [True, False])
def test_encoder_padding_changes_nothing(encoder, ids, left):
    tokens, documents = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, n_padding in enumerate([0, 2, 5]):
        documents[row, slice(0, n_padding) if left else slice(9 - n_padding, 9)] = 0
    batched = encoder(tokens, documents_BT=documents)
    noisy = encoder(torch.where(documents == 0, 28 - tokens, tokens), documents_BT=documents)
    assert torch.isfinite(batched).all()
    for row in range(3):
        real = documents[row] == 1
        single = encoder(tokens[row : row + 1, real])[0]
        close(batched[row, real], single)
        close(noisy[row, real], single)


def test_padded_pairs_equal_single_pairs(pair, ids):
    source, target = ids(2, 9), ids(2, 7, seed=2)
    source_documents, target_documents = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    source_documents[1, 5:] = 0
    target_documents[1, 4:] = 0
    hidden = pair.hidden(
        source, documents_BT=source_documents, decoder_input_ids_BT=target, decoder_documents_BT=target_documents
    )
    assert torch.isfinite(hidden).all()
    close(hidden[:1], pair.hidden(source[:1], decoder_input_ids_BT=target[:1]))
    close(hidden[1:, :4], pair.hidden(source[1:, :5], decoder_input_ids_BT=target[1:, :4]))


@pytest.mark.parametrize("cuts", [list(range(1, 7)), [3, 4, 6]])
def test_cached_pair_equals_the_full_pass(pair, ids, cuts):
    source, target = ids(2, 9), ids(2, 7, seed=2)
    documents = torch.ones(2, 9, dtype=torch.long)
    documents[0, 6:] = 0
    wanted = pair.hidden(source, documents_BT=documents, decoder_input_ids_BT=target)
    memory, cache = pair.encode(source, documents_BS=documents), KVCache(pair.config, 2, 10, dtype=torch.float64)
    pieces = []
    for start, stop in zip([0, *cuts], [*cuts, 7], strict=True):
        # After the first piece the memory itself is no longer needed: its keys and values are in the cache.
        pieces.append(
            pair.decode(
                target[:, start:stop], memory if start == 0 else None, memory_documents_BS=documents, cache=cache
            )
        )
    close(torch.cat(pieces, dim=1), wanted)


def test_selected_pairs_keep_their_memory(pair, ids):
    source, target = ids(2, 9), ids(2, 5, seed=2)
    documents = torch.ones(2, 9, dtype=torch.long)
    documents[0, 6:] = 0
    wanted = pair.hidden(source, documents_BT=documents, decoder_input_ids_BT=target)[:, -1]
    memory, cache = pair.encode(source, documents_BS=documents), KVCache(pair.config, 2, 10, dtype=torch.float64)
    pair.decode(target[:, :4], memory, memory_documents_BS=documents, cache=cache)
    rows = torch.tensor([1, 0, 1])
    cache.select(rows)
    got = pair.decode(target[rows, 4:], None, memory_documents_BS=documents[rows], cache=cache)[:, 0]
    close(got, wanted[rows])


def test_cache_goes_on_with_the_last_document():
    cache = KVCache(ModelConfig(vocab_size=5, d_model=8, n_heads=2), 3, 6)
    assert cache.mark(2, None) is None
    seen = cache.mark(3, torch.tensor([[0, 1, 1], [1, 1, 2], [0, 0, 0]]))
    assert seen.tolist() == [[0, 1, 1], [1, 1, 2], [0, 0, 0]]
    cache.advance(3)
    assert cache.mark(1, None)[:, -1].tolist() == [1, 2, 1]  # whatever follows mere padding is text


def test_position_offset_skips_rows_of_the_table(build, ids):
    model, plain = build(positions="learned", position_offset=2), build(positions="learned")
    state = model.state_dict()
    plain.load_state_dict({**state, "model.embed_positions.weight": state["model.embed_positions.weight"][2:]})
    close(model(ids(2, 9)), plain(ids(2, 9)))


def test_decoder_sees_no_future_and_encoder_does(variant, build, ids):
    tokens = ids(1, 9)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 29
    causal, bidirectional = build(**variant), build(family="encoder", **variant)
    bidirectional.load_state_dict(causal.state_dict())
    close(causal(tokens)[:, :6], causal(changed)[:, :6])
    assert not torch.allclose(causal(tokens)[:, 6:], causal(changed)[:, 6:])
    assert not torch.allclose(bidirectional(tokens)[:, :6], bidirectional(changed)[:, :6])


def test_encoder_is_the_decoder_without_causality(build, ids):
    causal, bidirectional = build(), build(family="encoder")
    assert causal.state_dict().keys() == bidirectional.state_dict().keys()
    tokens = ids(2, 1)
    close(causal(tokens), bidirectional(tokens))  # of one token there is no future
    causal.model.causal = False
    close(causal(ids(2, 9)), bidirectional(ids(2, 9)))


@st.composite
def any_config(draw):
    """Draw a shape that nobody has named: parts of all systems, mixed."""
    fields = {
        "family": draw(st.sampled_from(["decoder", "encoder_decoder"])),
        "n_kv_heads": draw(st.sampled_from([0, 1, 2])),
        "head_dim": draw(st.sampled_from([0, 6])),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_position": draw(st.sampled_from(["pre", "post"])),
        "positions": draw(st.sampled_from(["rope", "learned", "sinusoidal", "relative", "none"])),
        "n_relative_buckets": 6,
        "max_relative_distance": 9,
        "activation": draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
        "gated": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "attention_scale": draw(st.sampled_from([0.0, 1.0])),
        "attention_windows": draw(st.sampled_from([(), (3,), (0, 2), (1, 4, 0)])),
        "embedding_norm": draw(st.booleans()),
        "logits_scale": draw(st.sampled_from([1.0, 0.25])),
        "n_layers": 3,
    }
    return fields | {"query_layer": fields["family"] == "decoder" and draw(st.booleans())}


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(fields=any_config(), cuts=st.sets(st.integers(1, 8)), n_padding=st.integers(0, 4))
def test_any_mixture_decodes_padded_and_cached_like_alone(build, ids, fields, cuts, n_padding):
    model, tokens, source = build(**fields), ids(2, 9), ids(2, 5, seed=2)
    documents, source_documents = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    documents[1, :n_padding] = 0
    source_documents[0, 3:] = 0
    cache, pieces = KVCache(model.config, 2, 12, dtype=torch.float64), []
    pair = fields["family"] == "encoder_decoder"
    memory = model.encode(source, documents_BS=source_documents) if pair else None
    for start, stop in itertools.pairwise([0, *sorted(cuts), 9]):
        now = {"documents_BT": documents[:, start:stop], "cache": cache}
        if pair:
            pieces.append(model.decode(tokens[:, start:stop], memory, memory_documents_BS=source_documents, **now))
        else:
            pieces.append(model.hidden(tokens[:, start:stop], **now))
    hidden = torch.cat(pieces, dim=1)
    for row, (first, n_source) in enumerate([(0, 3), (n_padding, 5)]):
        alone = tokens[row : row + 1, first:]
        inputs = {"input_ids_BT": alone}
        if pair:
            inputs = {"input_ids_BT": source[row : row + 1, :n_source], "decoder_input_ids_BT": alone}
        close(hidden[row : row + 1, first:], model.hidden(**inputs))


def test_default_names_are_llama_names(build):
    names = set(build().state_dict())
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert {name.removeprefix("model.layers.0.") for name in names if ".layers.0." in name} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_head_of_hidden_is_the_forward_pass(decoder, ids):
    tokens = ids(2, 5)
    close(decoder.head(decoder.hidden(tokens)), decoder(tokens))
    close(
        F.linear(decoder.head_input(decoder.hidden(tokens)), decoder.lm_head.weight, decoder.lm_head.bias),
        decoder(tokens),
    )


def test_scaled_embeddings_and_logits(build, ids):
    plain, scaled = build(), build(embedding_scale=3.0, logits_scale=0.5)
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.model.embed_tokens.weight.mul_(3.0)
        plain.lm_head.weight = nn.Parameter(plain.lm_head.weight / 3.0 * 0.5)
    close(scaled(ids(2, 5)), plain(ids(2, 5)))


def test_token_types_are_added(build, ids):
    model = build(family="encoder", n_token_types=2, positions="learned")
    plain = build(family="encoder", positions="learned")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "token_types" not in k})
    with torch.no_grad():
        plain.model.embed_positions.weight += model.model.embed_token_types.weight[1]
    tokens = ids(2, 6)
    close(model(tokens, token_types_BT=torch.ones(2, 6, dtype=torch.long)), plain(tokens))
    close(model(tokens), model(tokens, token_types_BT=torch.zeros(2, 6, dtype=torch.long)))


def test_rows_before_the_position_offset_are_not_used(build, ids):
    plain, shifted = build(positions="learned", max_positions=12), build(positions="learned", position_offset=2)
    state = plain.state_dict()
    table = torch.cat([torch.full((2, 16), 1e3), state["model.embed_positions.weight"], torch.zeros(28, 16)])
    shifted.load_state_dict(state | {"model.embed_positions.weight": table})
    close(shifted(ids(2, 12)), plain(ids(2, 12)))


def test_embedding_norm_stands_before_the_first_block(build, ids):
    model = build(**POST, positions="learned", embedding_norm=True, embedding_scale=3.0)
    states: list[torch.Tensor] = []
    model.hidden(ids(2, 5), collect=states)
    embedded = 3.0 * model.model.embed_tokens.weight[ids(2, 5)] + model.model.embed_positions.weight[:5]
    close(states[0], layer_norm(embedded, model.model.embedding_norm))


def test_windows_and_layers_are_those_of_the_config(build):
    model = build(n_layers=5, attention_windows=(0, 3, 8), query_layer=True)
    assert [block.window for block in model.model.layers] == [0, 3, 8, 0, 3]
    assert model.model.query_layer.window == 8
    pair = build(family="encoder_decoder", n_layers=2, n_decoder_layers=3)
    assert (len(pair.model.encoder.layers), len(pair.model.decoder.layers)) == (2, 3)
    assert (pair.model.encoder.causal, pair.model.decoder.causal) == (False, True)


@pytest.mark.parametrize("causal", [True, False])
def test_relative_bias_is_looked_up_by_bucket(build, causal):
    kind = {"n_relative_buckets": 8, "max_relative_distance": 10}
    stack = build(family="decoder" if causal else "encoder", positions="relative", **kind).model
    bias = stack._bias(stack.relative_bias, 3, 20, torch.device("cpu"))
    for t, s in itertools.product(range(3), range(20)):
        offset = torch.tensor([s - (17 + t)])
        bucket = relative_buckets(offset, causal=causal, n_buckets=8, max_distance=10)
        close(bias[:, t, s], stack.relative_bias.weight[bucket[0]])


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_disentangled_scores_are_sums_of_three_products(build, ids, n_kv_heads):
    """arXiv:2006.03654, eq. 4, one query and key at a time: contents, content with distance, distance with content."""
    model = build(family="encoder", n_layers=1, n_kv_heads=n_kv_heads, **POST | DISTANCES)
    stack, tokens = model.model, ids(1, 9)
    x, attention = model.embed(tokens)[0], stack.layers[0].self_attn
    distances = stack.distance_norm(stack.embed_distances.weight)
    heads = lambda projection, states, n: projection(states).view(len(states), n, 4).repeat_interleave(4 // n, 1)
    q, q_distance = (heads(attention.q_proj, states, 4) for states in (x, distances))
    k, k_distance = (heads(attention.k_proj, states, n_kv_heads) for states in (x, distances))
    scores = torch.zeros(4, 9, 9, dtype=torch.float64)
    # 8 rows, 4 in each direction: distances to 2 are exact, 3 and more share the last row.
    for n, i, j in itertools.product(range(4), range(9), range(9)):
        row = 4 + (i - j if abs(i - j) <= 2 else (3 if i > j else -3 - (abs(i - j) > 6)))
        total = q[i, n] @ k[j, n] + q[i, n] @ k_distance[row, n] + k[j, n] @ q_distance[row, n]
        scores[n, i, j] = total / math.sqrt(3 * 4)
    v = heads(attention.v_proj, x, n_kv_heads)
    y = attention.o_proj(torch.einsum("nij,jnh->inh", scores.softmax(-1), v).flatten(1))
    expected = stack.layers[0].input_layernorm(x + y)
    expected = stack.layers[0].post_attention_layernorm(expected + stack.layers[0].mlp(expected))
    close(model.hidden(tokens)[0], expected)


def test_every_parameter_of_a_disentangled_model_has_a_gradient(build, ids):
    """DistributedDataParallel waits for the gradient of every parameter; activations may be recomputed."""
    model = build(family="encoder", **ENCODERS["deberta"]).train()
    model(ids(2, 3)).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.model.recompute = True
    model(ids(2, 3)).square().sum().backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name])


def test_rotation_is_as_slow_as_theta_says(build, ids):
    fast, slow = build(rope_theta=100.0), build(rope_theta=1e6)
    slow.load_state_dict(fast.state_dict())
    close(fast(ids(2, 1)), slow(ids(2, 1)))
    assert not torch.allclose(fast(ids(2, 9)), slow(ids(2, 9)))


def test_collect_holds_the_states_around_every_block(decoder, ids):
    states: list[torch.Tensor] = []
    decoder.hidden(ids(2, 5), collect=states)
    assert len(states) == decoder.config.n_layers + 1
    assert all(state.shape == (2, 5, 16) for state in states)


def one_block(**fields):
    config = complete(ModelConfig(vocab_size=2, d_model=12, n_heads=2, d_ff=20, positions="none", **fields))
    block = Block(config, 0, cross=fields.get("family") == "encoder_decoder").double()
    generator = torch.Generator().manual_seed(3)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=generator)
    return block, x, build_mask(5, 5, causal=True)


def layer_norm(x, norm):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def rms_norm(x, norm, eps=1e-5):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def test_post_norm_block_by_hand():
    block, x, mask = one_block(**POST, activation="relu")
    y = layer_norm(x + block.self_attn(x, mask), block.input_layernorm)
    inner = torch.relu(y @ block.mlp.up_proj.weight.T + block.mlp.up_proj.bias)
    z = y + inner @ block.mlp.down_proj.weight.T + block.mlp.down_proj.bias
    close(block(x, Pass({(0, 0): mask}, {})), layer_norm(z, block.post_attention_layernorm))


@pytest.mark.parametrize("eps", [1e-5, 0.7])
def test_pre_norm_block_by_hand(eps):
    block, x, mask = one_block(norm_eps=eps)
    y = x + block.self_attn(rms_norm(x, block.input_layernorm, eps), mask)
    h = rms_norm(y, block.post_attention_layernorm, eps)
    gate = h @ block.mlp.gate_proj.weight.T
    inner = gate / (1 + torch.exp(-gate)) * (h @ block.mlp.up_proj.weight.T)
    close(block(x, Pass({(0, 0): mask}, {})), y + inner @ block.mlp.down_proj.weight.T)


def test_cross_attention_by_hand():
    block, x, mask = one_block(family="encoder_decoder")
    memory = torch.randn(2, 4, 12, dtype=torch.float64)
    got = block(x, Pass({(0, 0): mask}, {}, memory_BSD=memory, memory_mask=build_mask(5, 4, causal=False)))
    y = x + block.self_attn(rms_norm(x, block.input_layernorm), mask)
    h, cross = rms_norm(y, block.cross_attention_layernorm), block.cross_attn
    heads = lambda z: z.view(2, -1, 2, 6).transpose(1, 2)
    weights = (heads(cross.q_proj(h)) @ heads(cross.k_proj(memory)).transpose(-1, -2) / math.sqrt(6)).softmax(-1)
    y = y + cross.o_proj((weights @ heads(cross.v_proj(memory))).transpose(1, 2).flatten(2))
    close(got, y + block.mlp(rms_norm(y, block.post_attention_layernorm)))


def test_query_layer_by_its_formula(build, ids):
    model, tokens = build(query_layer=True, positions="learned"), ids(2, 6)
    states: list[torch.Tensor] = []
    got = model.hidden(tokens, collect=states)
    # PanGu-Alpha: the final norm, then a layer whose queries are embeddings of the positions.
    x, block = rms_norm(states[-1], model.model.norm), model.model.query_layer
    h, attention = rms_norm(x, block.input_layernorm), block.self_attn
    heads = lambda z: z.view(2, 6, 4, 4).transpose(1, 2)
    query = heads(attention.q_proj(model.model.query_embeddings.weight[:6].expand(2, 6, 16)))
    scores = query @ heads(attention.k_proj(h)).transpose(-1, -2) / 2
    weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf")).softmax(-1)
    x = x + attention.o_proj((weights @ heads(attention.v_proj(h))).transpose(1, 2).flatten(2))
    close(got, x + block.mlp(rms_norm(x, block.post_attention_layernorm)))


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "n_kv_heads": 1}, {**POST, "activation": "gelu"}])
def test_gradients_of_a_block_equal_finite_differences(fields):
    block, x, mask = one_block(**fields)
    names = [name for name, _ in block.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(
            block, dict(zip(names, parameters, strict=True)), (x, Pass({(0, 0): mask}, {}))
        )

    inputs = (x[:1, :3].clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in block.parameters()))
    mask = build_mask(3, 3, causal=True)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def stored_once(model):
    """Return the tensors as a file holds them: a tied head stands under the embedding's name only."""
    tied = model.config.tie_embeddings
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not (tied and "lm_head.w" in name)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_loaded_tensors_make_the_same_model(build, ids, family, tied):
    model = build(family=family, tie_embeddings=tied)
    other = build(family=family, tie_embeddings=tied, seed=1)
    load_tensors(other, stored_once(model))
    inputs = {"decoder_input_ids_BT": ids(2, 4, seed=2)} if family == "encoder_decoder" else {}
    close(other(ids(2, 6), **inputs), model(ids(2, 6), **inputs))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


def test_tied_head_learns_from_both_of_its_uses(build, ids):
    tied, untied = build(), build(tie_embeddings=False)
    load_tensors(untied, stored_once(tied) | {"lm_head.weight": tied.lm_head.weight.detach().clone()})
    for model in (tied, untied):
        model(ids(2, 6)).logsumexp(-1).sum().backward()
    close(tied.lm_head.weight.grad, untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad)


@pytest.mark.parametrize("left_out", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_and_unknown_tensors_are_not_overlooked(build, left_out):
    model = build()
    tensors = stored_once(model)
    kept = tensors.pop(left_out)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_tensors(model, tensors)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_tensors(model, {**tensors, left_out: kept, "model.layers.2.mlp.up_proj.weight": kept})


def test_memory_of_padding_only_is_finite(build, ids):
    model = build(family="encoder_decoder")
    documents = torch.tensor([[1, 1, 1], [0, 0, 0]])
    logits = model(ids(2, 3), documents_BT=documents, decoder_input_ids_BT=ids(2, 4, seed=2))
    assert torch.isfinite(logits).all()


def test_dropout_acts_in_training_only(build, ids):
    model, tokens = build(dropout=0.3), ids(1, 6)
    close(model(tokens), model(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens))


@pytest.mark.parametrize(("family", "n_places"), [("decoder", 1 + 2 * 2), ("encoder_decoder", 1 + 2 * 2 + 1 + 2 * 3)])
def test_dropout_follows_embeddings_attention_and_feed_forward(build, ids, family, n_places):
    model, places = build(family=family, dropout=0.3), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: places.append(1))
    inputs = {"decoder_input_ids_BT": ids(1, 4)} if family == "encoder_decoder" else {}
    model(ids(1, 6), **inputs)
    assert len(places) == n_places


def test_dropout_is_scaled_and_leaves_the_residual_alone():
    block, x, mask = one_block(dropout=0.5)
    block.train()
    torch.manual_seed(0)
    draws = torch.stack([block(x, Pass({(0, 0): mask}, {})) - x for _ in range(400)])
    dropped = (draws == 0).double().mean()
    assert dropped.item() == pytest.approx(0.25, abs=0.03), "both of a layer's additions vanish at once"


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_depend_on_the_seed_alone(family):
    config = ModelConfig(vocab_size=50, d_model=32, n_layers=2, **FAMILIES[family])

    def weights(seed, noise):
        torch.manual_seed(noise)
        model = LanguageModel(config)
        torch.rand(noise)
        before = torch.get_rng_state()
        initialize(model, seed)
        assert torch.equal(before, torch.get_rng_state()), "the global generator was touched"
        return model.state_dict()

    first, again, other = weights(5, 1), weights(5, 2), weights(6, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_initial_spread_of_weights():
    model = LanguageModel(ModelConfig(vocab_size=500, d_model=128, n_layers=8, attention_bias=True, norm="layernorm"))
    initialize(model, 0)
    named = dict(model.named_parameters())
    assert named["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert named["model.layers.3.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert named["model.layers.3.mlp.down_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert named["model.layers.3.self_attn.o_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert (named["model.layers.3.self_attn.q_proj.bias"] == 0).all()
    assert (named["model.norm.weight"] == 1).all()
    assert (named["model.norm.bias"] == 0).all()


def test_initial_queries_carry_the_scale_that_scores_lack():
    model = LanguageModel(ModelConfig(vocab_size=50, d_model=256, n_heads=4, **FAMILIES["encoder_decoder"]))
    initialize(model, 0)
    named = dict(model.named_parameters())
    for side in ("encoder.layers.1.self_attn", "decoder.layers.1.cross_attn"):
        assert named[f"model.{side}.q_proj.weight"].std().item() == pytest.approx(0.02 / 8, rel=0.05)
        assert named[f"model.{side}.k_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_layers_show_what_they_attend_with(family, build, ids):
    model, tokens = build(family=family), ids(2, 9)
    target = {"decoder_input_ids_BT": ids(2, 6, seed=2)} if family == "encoder_decoder" else {}
    collect, attended = [], {1: None}
    hidden = model.hidden(tokens, collect=collect, attended=attended, **target)
    close(hidden, model.hidden(tokens, **target))
    block = model.stacks()[-1].layers[1]
    inputs = block.input_layernorm(collect[1])
    q_BNTH, k_BKTH, v_BKTH = attended[1]
    for projection, heads in zip(("q_proj", "k_proj", "v_proj"), (q_BNTH, k_BKTH, v_BKTH), strict=True):
        close(heads.transpose(1, 2).flatten(2), getattr(block.self_attn, projection)(inputs))
    assert list(attended) == [1]
