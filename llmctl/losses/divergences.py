"""Divergences between a teacher's distribution p and a student's q, row by row, with their gradients.

Each takes log q and log p (C, V) and gives the divergence of every row, and its gradient with respect to the logits of q.
Temperature is the caller's: both are at the same one. Where p and q are equal, divergence and gradient are exactly zero:
what is written as a difference is computed as one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.tables.losses import DIVERGENCES

Function = Callable[[Tensor, Tensor, "Divergence"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Divergence:
    """A divergence by name, and what shapes it.

    temperature: of both sides; losses are multiplied by its square (Hinton et al. 2015, arXiv:1503.02531). beta: the
    teacher's weight in jsd's mixture. skew: share of the other side in skl and srkl. head_mass: the teacher's
    probability that is akl's head. taid_share: the teacher's share in taid's target.
    """

    name: str = "fkl"
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    head_mass: float = 0.5
    taid_share: float = 1.0

    def __call__(self, log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each row (C,) and its gradient (C, V); the inputs are used up."""
        function: Function = globals()[DIVERGENCES[self.name].function]
        return function(log_q_CV, log_p_CV, self)


def forward_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return KL(p || q); gradient q - p.

    The sum of the gradient, which is nothing but rounding, is added to the terms: none of them is negative then, and a
    student that is next to its teacher has a loss of more than noise.
    """
    del options
    gap_CV = log_p_CV - log_q_CV
    p_CV = log_p_CV.exp_()
    gradient_CV = log_q_CV.exp_().sub_(p_CV)
    return gap_CV.mul_(p_CV).add_(gradient_CV).sum(dim=1), gradient_CV


def reverse_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return KL(q || p); gradient q (log q/p - KL)."""
    del options
    gap_CV = log_q_CV - log_p_CV
    q_CV, p_CV = log_q_CV.exp_(), log_p_CV.exp_()
    terms_CV = q_CV * gap_CV
    mean_C1 = terms_CV.sum(dim=1, keepdim=True)
    loss_C = terms_CV.add_(p_CV).sub_(q_CV).sum(dim=1)  # see `forward_kl`
    return loss_C, gap_CV.sub_(mean_C1).mul_(q_CV)


def centered(q_CV: Tensor, slope_CV: Tensor) -> Tensor:
    """Return the gradient with respect to logits, of one with respect to probabilities: q (s - E_q s)."""
    mean_C1 = (q_CV * slope_CV).sum(dim=1, keepdim=True)
    return slope_CV.sub_(mean_C1).mul_(q_CV)


def log_ratio(above_CV: Tensor, below_CV: Tensor) -> Tensor:
    """Return log(above / below): zero where they are equal, and where the first is nothing, as its product with it is."""
    ratio_CV = above_CV / below_CV
    return torch.where(ratio_CV > 0, ratio_CV, 1.0).log_()


def jensen_shannon(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""
    beta = options.beta
    q_CV, p_CV = log_q_CV.exp_(), log_p_CV.exp_()
    m_CV = q_CV + beta * (p_CV - q_CV)
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
    """Return above / below - 1, and 0 where both are nothing."""
    return torch.where(below_CV > 0, (above_CV - below_CV) / below_CV, 0.0)


def adaptive_kl(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return w KL(p || q) + (1 - w) KL(q || p), w being the head's share of the gap |p - q|; w has no gradient.

    The head is the fewest likeliest tokens that hold `head_mass` of the teacher.
    """
    p_CV, gap_CV = log_p_CV.exp(), (log_p_CV.exp() - log_q_CV.exp()).abs_()
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
    """Return KL(r || q), r between student and teacher: softmax((1 - t) log q + t log p), without gradient."""
    log_r_CV = log_p_CV.sub_(log_q_CV).mul_(options.taid_share).add_(log_q_CV)
    # Both sums are made in the same way, so that nothing is left of them where the distributions are equal.
    log_r_CV -= log_r_CV.logsumexp(dim=1, keepdim=True) - log_q_CV.logsumexp(dim=1, keepdim=True)
    return forward_kl(log_q_CV, log_r_CV, options)


def total_variation(log_q_CV: Tensor, log_p_CV: Tensor, options: Divergence) -> tuple[Tensor, Tensor]:
    """Return half the sum of |p - q|: 1 - it is what speculative decoding accepts."""
    del options
    q_CV, gap_CV = log_q_CV.exp_(), log_p_CV.exp_()
    gap_CV.neg_().add_(q_CV)
    return gap_CV.abs().sum(dim=1) / 2, centered(q_CV, gap_CV.sign_().div_(2))
