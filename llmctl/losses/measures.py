"""Metrics that compare a student with its teacher, as sums over labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.losses.logits import cached_rows

N_BINS = 15
"""Bins of the student's confidence for the calibration error, as in Guo et al. 2017, arXiv:1706.04599."""


@dataclass
class Measures:
    """Sums over labels, float64: KL(p || q), top-1 agreement, sum of min(p, q), and confidence bins (3, N_BINS).

    The bins' rows: number of labels, sum of the top-1 confidences, number of correct top-1 predictions.
    """

    kl: Tensor
    agreement: Tensor
    overlap: Tensor
    bins: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "Measures":
        """Return empty sums."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(zero, zero, zero, torch.zeros(3, N_BINS, dtype=torch.float64, device=device))

    def add(self, log_q_CV: Tensor, log_p_CV: Tensor, labels_C: Tensor) -> None:
        """Add a chunk of labels; both distributions must be at temperature 1."""
        rows = cached_rows(log_q_CV)
        for parts in zip(rows, cached_rows(log_p_CV), labels_C.split(len(rows[0])), strict=True):
            self._add(*parts)

    def _add(self, log_q_CV: Tensor, log_p_CV: Tensor, labels_C: Tensor) -> None:
        q_CV, p_CV = log_q_CV.exp(), log_p_CV.exp()
        # q - p sums to zero and makes every term non-negative, see `divergences.forward_kl`.
        self.kl = self.kl + (p_CV * (log_p_CV - log_q_CV) + q_CV - p_CV).sum(dtype=torch.float64)
        confidence_C, best_C = q_CV.max(dim=1)
        self.agreement = self.agreement + (p_CV.argmax(dim=1) == best_C).sum(dtype=torch.float64)
        self.overlap = self.overlap + torch.minimum(p_CV, q_CV).sum(dtype=torch.float64)
        bins_C = (confidence_C * N_BINS).long().clamp_(0, N_BINS - 1)
        values_3C = torch.stack([torch.ones_like(confidence_C), confidence_C, (best_C == labels_C).to(q_CV.dtype)])
        self.bins.index_add_(1, bins_C, values_3C.double())
