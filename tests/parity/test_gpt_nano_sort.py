"""gpt-nano-sort, a trained GPT-2, against its author's own hidden states, attentions and logits."""

from itertools import product

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def model(shared_data, load):
    return load(shared_data / "models" / "gpt-nano-sort")


@pytest.fixture(scope="module")
def arrays(shared_data):
    return np.load(shared_data / "models" / "gpt-nano-sort" / "reference.npz")


@torch.no_grad()
def test_hidden_states_attentions_and_logits(model, arrays, figure):
    ids, collected = torch.tensor(arrays["input_ids"]).long(), []
    normed = model.hidden(ids, collect=collected)
    names = ("embeddings", "hidden_after_block0", "hidden_after_block1", "hidden_after_block2")
    pairs = dict(zip(names, collected, strict=True)) | {"final_norm": normed, "logits": model.head(normed)}
    pairs["attn_probs_block0"] = attention(model, collected[0])
    for name, tensor in pairs.items():
        difference = float(np.abs(tensor.numpy() - arrays[name]).max())
        figure("gpt-nano-sort", f"max |difference|, {name}", f"{difference:.2e}")
        assert difference < 1e-4, name


def attention(model, x_BTD: torch.Tensor) -> torch.Tensor:
    """Return the attention probabilities (B, N, T, T) of the first layer, by the textbook."""
    layer = model.model.layers[0]
    h_BTD, n_heads = layer.input_layernorm(x_BTD), model.config.n_heads
    q_BNTH = layer.self_attn.q_proj(h_BTD).unflatten(-1, (n_heads, -1)).transpose(1, 2)
    k_BNTH = layer.self_attn.k_proj(h_BTD).unflatten(-1, (n_heads, -1)).transpose(1, 2)
    scores_BNTT = q_BNTH @ k_BNTH.mT * model.config.head_dim**-0.5
    future_TT = torch.ones(x_BTD.shape[1], x_BTD.shape[1]).triu(1).bool()
    return scores_BNTT.masked_fill(future_TT, float("-inf")).softmax(-1)


@torch.no_grad()
def test_it_sorts_all_729_inputs(model, figure):
    ids = torch.tensor(list(product(range(3), repeat=6)))
    rows = ids
    for _ in range(6):
        rows = torch.cat([rows, model(rows)[:, -1:].argmax(-1)], dim=1)
    n_sorted = int((rows[:, 6:] == ids.sort(dim=1).values).all(dim=1).sum())
    figure("gpt-nano-sort", "inputs sorted", f"{n_sorted} of 729")
    assert n_sorted == 729
