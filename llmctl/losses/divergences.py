"""Divergences between a teacher's distribution p and a student's q, per row, with their gradients.

Each takes log q and log p (C, V), both at the caller's temperature, and returns every row's divergence and the gradient
with respect to the logits of q. If p equals q, divergence and gradient are exactly zero: terms that cancel are computed
as differences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.tables.losses import DIVERGENCES

Function = Callable[[Tensor, Tensor, "Divergence"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Divergence:
    """A divergence by name, with its parameters.

    temperature: of both distributions; losses are multiplied by its square (Hinton et al. 2015, arXiv:1503.02531).
    beta: the teacher's weight in jsd's mixture. skew: the weight of the first distribution in skl's and srkl's mixture.
    head_mass: the teacher probability of akl's head. taid_share: the teacher's weight in taid's target.
    """

    name: str = "fkl"
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    head_mass: float = 0.5
    taid_share: float = 1.0

    def __call__(self, log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each row (C,) and its gradient (C, V); the inputs are overwritten."""
        function: Function = globals()[DIVERGENCES[self.name].function]
        return function(log_q_CV, log_p_CV, self)


def forward_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return KL(p || q); gradient q - p.

    The gradient sums to zero up to rounding, so adding it to the terms does not change the result; it makes each term
    (p log p/q + q - p) non-negative, so that the loss of a student close to its teacher is not lost in rounding.
    """
    del options
    gap_CV = log_p_CV - log_q_CV
    p_CV = log_p_CV.exp_()
    gradient_CV = log_q_CV.exp_().sub_(p_CV)
    return gap_CV.mul_(p_CV).add_(gradient_CV).sum(dim=1), gradient_CV


def reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return KL(q || p); gradient q (log q/p - KL)."""
    del options
    # In-place exponentials reuse the buffers of the logarithms: chunks are large.
    gap_CV = log_q_CV - log_p_CV
    q_CV, p_CV = log_q_CV.exp_(), log_p_CV.exp_()
    terms_CV = q_CV * gap_CV
    mean_C1 = terms_CV.sum(dim=1, keepdim=True)
    loss_C = terms_CV.add_(p_CV).sub_(q_CV).sum(dim=1)  # see `forward_kl`
    return loss_C, gap_CV.sub_(mean_C1).mul_(q_CV)


def centered(q_CV: Tensor, slope_CV: Tensor) -> Tensor:
    """Convert a gradient s with respect to probabilities into one with respect to logits: q (s - E_q s)."""
    mean_C1 = (q_CV * slope_CV).sum(dim=1, keepdim=True)
    return slope_CV.sub_(mean_C1).mul_(q_CV)


def log_ratio(above_CV: Tensor, below_CV: Tensor) -> Tensor:
    """Return log(above / below), exactly 0 if they are equal; also 0 if `above` is 0, since above * log(above) is."""
    ratio_CV = above_CV / below_CV
    return torch.where(ratio_CV > 0, ratio_CV, 1.0).log_()


def jensen_shannon(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""
    beta = options.beta
    q_CV, p_CV = log_q_CV.exp_(), log_p_CV.exp_()
    m_CV = q_CV + beta * (p_CV - q_CV)  # in this form exactly q if p equals q
    from_p_C = log_ratio(p_CV, m_CV).mul_(p_CV).sum(dim=1)
    slope_CV = log_ratio(q_CV, m_CV)
    from_q_C = (q_CV * slope_CV).sum(dim=1)
    return beta * from_p_C + (1 - beta) * from_q_C, centered(q_CV, slope_CV).mul_(1 - beta)


def skew_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return KL(p || a p + (1 - a) q)."""
    q_CV, p_CV = log_q_CV.exp_(), log_p_CV.exp_()
    m_CV = q_CV + options.skew * (p_CV - q_CV)
    loss_C = log_ratio(p_CV, m_CV).mul_(p_CV).sum(dim=1)
    return loss_C, centered(q_CV, excess(p_CV, m_CV).mul_(options.skew - 1))


def skew_reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return KL(q || (1 - a) p + a q)."""
    q_CV, p_CV = log_q_CV.exp_(), log_p_CV.exp_()
    m_CV = p_CV + options.skew * (q_CV - p_CV)
    slope_CV = log_ratio(q_CV, m_CV)
    loss_C = (q_CV * slope_CV).sum(dim=1)
    return loss_C, centered(q_CV, slope_CV.sub_(excess(q_CV, m_CV), alpha=options.skew))


def excess(above_CV: Tensor, below_CV: Tensor) -> Tensor:
    """Return above / below - 1, and 0 if both are 0."""
    return torch.where(below_CV > 0, (above_CV - below_CV) / below_CV, 0.0)


def adaptive_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return w KL(p || q) + (1 - w) KL(q || p), w being the head's share of the gap |p - q|; w has no gradient.

    The head is the smallest set of the teacher's most likely tokens with a total probability of `head_mass`.
    """
    p_CV, gap_CV = log_p_CV.exp(), (log_p_CV.exp() - log_q_CV.exp()).abs_()
    # A token belongs to the head if the more likely ones before it have less than head_mass.
    sorted_CV, order_CV = p_CV.sort(dim=1, descending=True, stable=True)
    before_CV = sorted_CV.cumsum(dim=1) - sorted_CV
    is_head_CV = torch.empty_like(before_CV, dtype=torch.bool).scatter_(1, order_CV, before_CV < options.head_mass)
    total_C = gap_CV.sum(dim=1)
    share_C = (gap_CV * is_head_CV).sum(dim=1) / torch.where(total_C > 0, total_C, 1.0)
    forward_C, forward_CV = forward_kl(log_q_CV.clone(), log_p_CV.clone(), options)
    reverse_C, reverse_CV = reverse_kl(log_q_CV, log_p_CV, options)
    gradient_CV = forward_CV.mul_(share_C[:, None]).add_(reverse_CV.mul_(1 - share_C[:, None]))
    return share_C * forward_C + (1 - share_C) * reverse_C, gradient_CV


def interpolated_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return KL(r || q) with the interpolated target r = softmax((1 - t) log q + t log p), without its gradient."""
    log_r_CV = log_p_CV.sub_(log_q_CV).mul_(options.taid_share).add_(log_q_CV)
    # Both normalizers are computed the same way, so that they cancel exactly if the distributions are equal.
    log_r_CV -= log_r_CV.logsumexp(dim=1, keepdim=True) - log_q_CV.logsumexp(dim=1, keepdim=True)
    return forward_kl(log_q_CV, log_r_CV, options)


def total_variation(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return half the sum of |p - q|, which is one minus the acceptance rate of speculative decoding."""
    del options
    q_CV, gap_CV = log_q_CV.exp_(), log_p_CV.exp_()
    gap_CV.neg_().add_(q_CV)
    return gap_CV.abs().sum(dim=1) / 2, centered(q_CV, gap_CV.sign_().div_(2))
