"""Combinations of few vectors: exact where there is one, and better with every further vector."""

import torch

from llmctl.model import sparse_combinations
from llmctl.model.sparse_combinations import combinations


def test_what_is_made_of_few_atoms_is_found(monkeypatch):
    monkeypatch.setattr(sparse_combinations, "CHUNK", 7)
    torch.manual_seed(0)
    atoms = torch.randn(200, 64)
    places = torch.stack([torch.randperm(200)[:3] for _ in range(20)])
    factors = torch.tensor([[3.0, -2.0, 1.0]]).expand(20, 3)
    wanted = (atoms[places] * factors[..., None]).sum(dim=1)
    chosen, found = combinations(wanted, atoms, 3)
    assert torch.equal(chosen.sort(dim=1).values, places.sort(dim=1).values)
    torch.testing.assert_close((atoms[chosen] * found[..., None]).sum(dim=1), wanted, rtol=1e-3, atol=1e-3)


def test_more_atoms_leave_less_and_no_atom_is_chosen_twice():
    torch.manual_seed(0)
    atoms, wanted = torch.randn(300, 32) * torch.rand(300, 1), torch.randn(10, 32)
    left = []
    for n_atoms in (1, 4, 16, 64):
        chosen, found = combinations(wanted, atoms, n_atoms)
        assert chosen.shape[1] == min(n_atoms, 32)
        assert all(len(set(row)) == len(row) for row in chosen.tolist())
        left.append(float(((atoms[chosen] * found[..., None]).sum(dim=1) - wanted).norm()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-2 * left[0]


def test_fewer_atoms_than_wanted_and_a_zero_vector():
    atoms = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    chosen, found = combinations(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]), atoms, 2)
    torch.testing.assert_close(
        (atoms[chosen] * found[..., None]).sum(dim=1),
        torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]),
        atol=1e-4,
        rtol=0,
    )
