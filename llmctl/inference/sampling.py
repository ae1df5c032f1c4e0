"""Choose the next token: pure functions on logits (B, V), applied in the order of `choose`.

Excluded tokens have a logit of minus infinity; every filter keeps at least the most likely token.
"""

import torch
from torch import Tensor

from llmctl.config import GenerateConfig
from llmctl.errors import ArtifactError


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens that occurred before.

    Shapes: logits (B, V), seen (B, V) bool. Source: CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    if penalty == 1.0:
        return logits_BV
    changed_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, changed_BV, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Exclude all but the k most likely tokens (and ties with the k-th). Source: arXiv:1805.04833."""
    if k <= 0 or k >= logits_BV.shape[1]:
        return logits_BV
    threshold_B1 = logits_BV.topk(k, dim=1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < threshold_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Exclude all but the smallest set of tokens with a cumulative probability of p. Source: arXiv:1904.09751, eq. 2."""
    if p >= 1.0:
        return logits_BV
    ordered_BV, order_BV = logits_BV.sort(dim=1, descending=True, stable=True)
    probabilities_BV = ordered_BV.softmax(dim=1)
    before_BV = probabilities_BV.cumsum(dim=1) - probabilities_BV
    excluded_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(excluded_BV, float("-inf"))


def keep_min_p(logits_BV: Tensor, min_p: float) -> Tensor:
    """Exclude tokens with a probability below min_p times the top probability. Source: arXiv:2407.01082."""
    if min_p <= 0.0:
        return logits_BV
    log_probabilities_BV = logits_BV.log_softmax(dim=1)
    threshold_B1 = log_probabilities_BV.amax(dim=1, keepdim=True) + torch.tensor(min_p).log()
    return logits_BV.masked_fill(log_probabilities_BV < threshold_B1, float("-inf"))


def require_finite(best: Tensor) -> None:
    """Refuse logits that are not finite; `best` is the maximum of each row, which is NaN if any logit is.

    Raises: ArtifactError.
    """
    if not best.isfinite().all():
        raise ArtifactError("the model's logits are not finite numbers", "check the weights, or use `--dtype float32`")


def choose(
    logits_BV: Tensor, seen_BV: Tensor | None, config: GenerateConfig, generators: list[torch.Generator]
) -> Tensor:
    """Choose the next token of every row (B,), each with its own random generator.

    Temperature is applied before top-k, top-p and min-p, as in transformers.
    Raises: ArtifactError if logits are not finite.
    """
    logits_BV = logits_BV.float()
    if seen_BV is not None:
        logits_BV = penalize_repetition(logits_BV, seen_BV, config.repetition_penalty)
    best_B, top_B = logits_BV.max(dim=1)
    require_finite(best_B)
    if config.temperature == 0:
        return top_B
    # Subtracting the maximum keeps the top token at 0, and the divisor is a normal float32: a tiny temperature then
    # becomes greedy instead of NaN.
    temperature = max(config.temperature, torch.finfo(torch.float32).tiny)
    logits_BV = keep_top_k((logits_BV - best_B[:, None]) / temperature, config.top_k)
    logits_BV = keep_min_p(keep_top_p(logits_BV, config.top_p), config.min_p)
    probabilities_BV = logits_BV.softmax(dim=1).cpu()
    # One uniform number per row and inversion of the cumulative sum: independent of the rest of the batch.
    draws = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
    cumulative_BV = probabilities_BV.double().cumsum(dim=1)
    totals_B1 = cumulative_BV[:, -1:]
    # A number just below 1 may round up to the total, which no cumulative sum exceeds: keep it below.
    targets_B1 = torch.minimum(
        torch.stack(draws)[:, None] * totals_B1, totals_B1.nextafter(torch.zeros_like(totals_B1))
    )
    return torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(1).to(logits_BV.device)
