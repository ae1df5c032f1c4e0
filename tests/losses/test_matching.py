import pytest
import torch
from torch.nn import functional as F

from llmctl.losses import matching
from llmctl.losses.matching import hidden_match, relation_match


def heads(n_heads: int, width: int, *, T: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n_heads, T, width, generator=generator, dtype=torch.float64)


def case(seed=0):
    own = (heads(4, 6, seed=seed), heads(2, 6, seed=seed + 1), heads(2, 6, seed=seed + 2))
    told = (heads(2, 16, seed=seed + 3), heads(2, 16, seed=seed + 4), heads(2, 16, seed=seed + 5))
    return own, told


def textbook(own, told, n_heads, documents, causal) -> float:
    """Return MiniLMv2's loss, relation by relation, row by row."""
    total = 0.0
    for a, b in zip(own, told, strict=True):
        B, _, T, _ = a.shape
        flat = [x.transpose(1, 2).reshape(B, T, -1) for x in (a, b)]
        for row in range(B):
            for head in range(n_heads):
                parts = [x[row].reshape(T, n_heads, -1)[:, head] for x in flat]
                for i in range(T):
                    if documents is not None and documents[row, i] == 0:
                        continue
                    seen = [
                        j
                        for j in range(T)
                        if (not causal or j <= i) and (documents is None or documents[row, j] == documents[row, i])
                    ]
                    q, p = (torch.stack([x[i] @ x[j] / x.shape[-1] ** 0.5 for j in seen]).softmax(0) for x in parts)
                    total += float((p * (p / q).log()).sum()) / n_heads / 3
    return total


DOCUMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [2**24, 1])
def test_relations_are_those_of_the_paper(documents, causal, scores, monkeypatch):
    monkeypatch.setattr(matching, "SCORES", scores)
    own, told = case()
    found = relation_match(own, told, 4, documents, causal=causal)
    assert float(found) == pytest.approx(textbook(own, told, 4, documents, causal), rel=1e-5)


def test_equal_relations_are_no_loss_and_padding_has_no_gradient():
    own, told = case()
    assert float(relation_match(own, own, 4, DOCUMENTS)) == pytest.approx(0, abs=1e-6)
    inputs = tuple(x.clone().requires_grad_() for x in own)
    relation_match(inputs, told, 4, DOCUMENTS).backward()
    for x in inputs:
        assert torch.isfinite(x.grad).all()
        assert not x.grad[0, :, 6].any()
        assert not x.grad[1, :, 5:].any()
        assert x.grad[0, :, 0].any()


def test_states_point_where_the_teacher_does():
    generator = torch.Generator().manual_seed(0)
    own, told = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    expected = sum(1 - float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(own, told, strict=True))
    assert float(hidden_match(own, told)) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_match(3 * told, told)) == pytest.approx(0, abs=1e-6)
