"""Vectors as combinations of a few given ones: orthogonal matching pursuit.

Source: Pati et al. 1993, "Orthogonal matching pursuit"; from the products of all vectors: Rubinstein et al. 2008, "Efficient
implementation of the K-SVD algorithm using batch orthogonal matching pursuit".
"""

from collections.abc import Callable

import torch
from torch import Tensor

CANDIDATES = 256
"""Vectors among which those of a combination are chosen: the ones with the largest cosine."""

CHUNK = 64
"""Vectors that are combined at a time."""

RIDGE = 1e-6
"""Added to the diagonal of the equations of unit vectors: some are nearly the same."""


@torch.no_grad()
def combinations(
    wanted_ND: Tensor, atoms_MD: Tensor, n_atoms: int, *, done: Callable[[int], None] = lambda _: None
) -> tuple[Tensor, Tensor]:
    """Return which atoms (N, K), and with what coefficients (N, K), approximate every vector; K is at most `n_atoms`.

    In each round the atom that is most similar to what is missing is added, and all coefficients are solved again. `done` is
    called with the number of finished vectors.
    """
    lengths_M = atoms_MD.norm(dim=1).clamp_(min=1e-12)
    unit_MD = atoms_MD / lengths_M[:, None]
    parts = []
    for start in range(0, max(len(wanted_ND), 1), CHUNK):
        parts.append(_combined(wanted_ND[start : start + CHUNK], unit_MD, n_atoms))
        done(min(start + CHUNK, len(wanted_ND)))
    chosen_NK, coefficients_NK = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return chosen_NK, coefficients_NK / lengths_M[chosen_NK]


def _combined(wanted_CD: Tensor, unit_MD: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    n, n_candidates = len(wanted_CD), min(CANDIDATES, len(unit_MD))
    near_CA = (wanted_CD @ unit_MD.T).abs_().topk(n_candidates, dim=1).indices
    candidates_CAD = unit_MD[near_CA]
    products_CAA = candidates_CAD @ candidates_CAD.mT
    first_CA = (candidates_CAD @ wanted_CD[:, :, None]).squeeze(2)
    missing_CA, chosen = first_CA.clone(), first_CA.new_zeros(n, 0, dtype=torch.long)
    free_CA, solution_CK = torch.ones_like(first_CA, dtype=torch.bool), first_CA.new_zeros(n, 0)
    for k in range(1, min(n_atoms, n_candidates, wanted_CD.shape[1]) + 1):
        best_C1 = missing_CA.abs().masked_fill_(~free_CA, -1.0).argmax(dim=1, keepdim=True)
        free_CA.scatter_(1, best_C1, False)
        chosen = torch.cat([chosen, best_C1], dim=1)
        rows_CKA = products_CAA.gather(1, chosen[:, :, None].expand(-1, -1, n_candidates))
        square_CKK = rows_CKA.gather(2, chosen[:, None].expand(-1, k, -1))
        square_CKK += RIDGE * torch.eye(k, dtype=square_CKK.dtype, device=square_CKK.device)
        solution_CK = torch.linalg.solve(square_CKK, first_CA.gather(1, chosen))
        missing_CA = first_CA - (solution_CK[:, None] @ rows_CKA).squeeze(1)
    return near_CA.gather(1, chosen), solution_CK
