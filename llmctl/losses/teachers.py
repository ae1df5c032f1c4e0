"""The forms in which a loss takes what a teacher says of N labels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """All of it: what the head's matrix multiplies (N, D), the matrix (V, D), and its bias (V,)."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None


@dataclass(frozen=True)
class SparseTeacher:
    """Some of it: tokens (N, K) with probabilities (N, K), padded with probability 0.

    Without a tail the tokens are the whole target: draws, whose histogram is right on average (random sampling
    knowledge distillation, Anshumann et al. 2025, arXiv:2503.16870). With a tail (N,), the mass of all other tokens, the
    student is compared over K + 1 categories; padding then repeats a token of its row.
    """

    ids_NK: Tensor
    probabilities_NK: Tensor
    tail_N: Tensor | None = None
