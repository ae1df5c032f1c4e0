"""Losses between intermediate states of two models: hidden states and attention relations."""

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES = 2**24
"""The most relation scores that exist at a time: 64 MiB in float32 of each kind."""

Heads = tuple[Tensor, Tensor, Tensor]


def hidden_match(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Return 1 - cosine similarity of hidden states, summed over positions.

    Shapes: (N, D) twice -> scalar. Source: the cosine loss of DistilBERT, Sanh et al. 2019, arXiv:1910.01108, section 3.
    """
    return (1 - F.cosine_similarity(student_ND.float(), teacher_ND.float(), dim=1)).sum()


def relation_match(
    student: Heads, teacher: Heads, n_heads: int, documents_BT: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Return KL(teacher || student) between attention relations, summed over positions.

    A relation is softmax(x x^T / sqrt(width)) of queries, keys or values that are resplit into `n_heads` heads; the loss
    is the mean over heads and over the three. A position relates to those it may attend to: of the same document, and
    not after it if `causal`. Padding (document 0) is ignored.

    Shapes: queries (B, N, T, H), keys and values (B, K, T, H) of either -> scalar. Widths may differ, each must be
    divisible by `n_heads`.
    Source: MiniLMv2, Wang et al. 2020, arXiv:2012.15828, eq. 5-8.
    """
    allowed_BTT = allowed(student[0], documents_BT, causal=causal)
    counts_BT = None if documents_BT is None else documents_BT != 0
    total = student[0].new_zeros((), dtype=torch.float32)
    for own, target in zip(student, teacher, strict=True):
        own_BRTH, target_BRTH = split(own, n_heads), split(target, n_heads)
        B, R, T, _ = own_BRTH.shape
        step = max(1, SCORES // (B * T * T))
        for start in range(0, R, step):
            heads = slice(start, start + step)
            log_q = relation(own_BRTH[:, heads], allowed_BTT)
            with torch.no_grad():
                log_p = relation(target_BRTH[:, heads], allowed_BTT)
                p = log_p.exp()
            # Masked positions have log-probability -inf on both sides, whose difference would be nan.
            gap = torch.where(allowed_BTT[:, None], log_p - log_q, 0.0)
            losses_BRT = (p * gap).sum(dim=-1)
            if counts_BT is not None:
                losses_BRT = losses_BRT * counts_BT[:, None]
            total = total + losses_BRT.sum() / (3 * R)
    return total


def allowed(like_BNTH: Tensor, documents_BT: Tensor | None, *, causal: bool) -> Tensor:
    """Return the mask of related positions, bool (B or 1, T, T); padding relates to itself, to avoid empty rows."""
    T, device = like_BNTH.shape[2], like_BNTH.device
    allowed_BTT = torch.ones(1, T, T, dtype=torch.bool, device=device)
    if causal:
        allowed_BTT = allowed_BTT.tril()
    if documents_BT is not None:
        same_BTT = (documents_BT[:, :, None] == documents_BT[:, None, :]) & (documents_BT != 0)[:, :, None]
        allowed_BTT = (allowed_BTT & same_BTT) | torch.eye(T, dtype=torch.bool, device=device)
    return allowed_BTT


def split(x_BNTH: Tensor, n_heads: int) -> Tensor:
    """Concatenate the heads and split them again into R heads: (B, R, T, width / R)."""
    return x_BNTH.transpose(1, 2).flatten(2).unflatten(-1, (n_heads, -1)).transpose(1, 2).float()


def relation(x_BRTH: Tensor, allowed_BTT: Tensor) -> Tensor:
    """Return the log-probabilities of relations (B, R, T, T)."""
    scores = x_BRTH @ x_BRTH.transpose(-1, -2) / x_BRTH.shape[-1] ** 0.5
    return scores.masked_fill(~allowed_BTT[:, None], float("-inf")).log_softmax(dim=-1)
