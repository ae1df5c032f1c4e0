"""The forms in which a loss accepts a teacher's predictions of N labels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """The full distribution, as last hidden states (N, D), the head's weight (V, D) and bias (V,), and its soft cap."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float = 0.0


@dataclass(frozen=True)
class SparseTeacher:
    """A part of the distribution: tokens (N, K) with probabilities (N, K), padded with probability 0.

    Without a tail the tokens are the complete target: samples, whose histogram is an unbiased estimate (random sampling
    knowledge distillation, Anshumann et al. 2025, arXiv:2503.16870). With a tail (N,), the total probability of all
    other tokens, the loss is over K + 1 categories; padding then repeats a token of its row.
    """

    ids_NK: Tensor
    probabilities_NK: Tensor
    tail_N: Tensor | None = None
