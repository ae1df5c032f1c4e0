"""Losses on preferences: functions of the log probabilities of answers, per pair or per answer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.tables.preferences import PREFERENCES

Function = Callable[["Answers", "Answers", "Preference"], Tensor]


@dataclass(frozen=True)
class Answers:
    """Answers to P prompts.

    log_probs: the log probability of each in nats, summed over its tokens or their mean, as the loss takes it. reference: the
    same of the model before training; zero for losses without. means: always per token.
    """

    log_probs_P: Tensor
    reference_P: Tensor
    means_P: Tensor

    @property
    def gains(self) -> Tensor:
        """The log probabilities (P,) relative to the reference."""
        return self.log_probs_P - self.reference_P


@dataclass(frozen=True)
class Preference:
    """A loss on preferences by name, with its parameters.

    beta: the strength of the preference. label_smoothing: probability that a label is wrong (dpo, simpo). gamma: the margin
    that simpo asks for. desirable, undesirable: weights of the answers (kto).
    """

    name: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    desirable: float = 1.0
    undesirable: float = 1.0

    def of_pairs(self, chosen: Answers, rejected: Answers) -> Tensor:
        """Return the loss of each pair (P,)."""
        function: Function = globals()[PREFERENCES[self.name].function]
        return function(chosen, rejected, self)

    def of_answers(self, answers: Answers, is_desirable_P: Tensor, divergence: Tensor) -> Tensor:
        """Return the loss of each answer (P,). divergence: of the model from the reference, a constant."""
        return kto(answers, is_desirable_P, divergence, self)


def likelier(margin_P: Tensor, smoothing: float) -> Tensor:
    """Return -log sigmoid of a margin; with smoothing s also s of that of its opposite (Mitchell 2023, conservative DPO)."""
    losses_P = -F.logsigmoid(margin_P)
    return (1 - smoothing) * losses_P - smoothing * F.logsigmoid(-margin_P) if smoothing else losses_P


def dpo(chosen: Answers, rejected: Answers, options: Preference) -> Tensor:
    """Return -log sigmoid(beta (gain of the chosen answer - gain of the rejected one))."""
    return likelier(options.beta * (chosen.gains - rejected.gains), options.label_smoothing)


def ipo(chosen: Answers, rejected: Answers, options: Preference) -> Tensor:
    """Return (gain of the chosen answer - gain of the rejected one - 1 / (2 beta))^2."""
    return (chosen.gains - rejected.gains - 1 / (2 * options.beta)).square()


def simpo(chosen: Answers, rejected: Answers, options: Preference) -> Tensor:
    """Return -log sigmoid(beta (mean log probability of the chosen answer - of the rejected one) - gamma)."""
    margin_P = options.beta * (chosen.log_probs_P - rejected.log_probs_P) - options.gamma
    return likelier(margin_P, options.label_smoothing)


def orpo(chosen: Answers, rejected: Answers, options: Preference) -> Tensor:
    """Return the cross-entropy of the chosen answer per token - beta log sigmoid(log odds ratio of the mean probabilities)."""
    log_odds_P = chosen.log_probs_P - rejected.log_probs_P
    log_odds_P = log_odds_P - log1mexp(chosen.log_probs_P) + log1mexp(rejected.log_probs_P)
    return -chosen.means_P - options.beta * F.logsigmoid(log_odds_P)


def kto(answers: Answers, is_desirable_P: Tensor, divergence: Tensor, options: Preference) -> Tensor:
    """Return w (1 - sigmoid(beta (gain - divergence))) for desirable answers, and of the opposite sign for others."""
    distance_P = options.beta * (answers.gains - divergence)
    desirable_P = options.desirable * (1 - torch.sigmoid(distance_P))
    undesirable_P = options.undesirable * (1 - torch.sigmoid(-distance_P))
    return torch.where(is_desirable_P, desirable_P, undesirable_P)


def log1mexp(x_P: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0; for an answer of probability 1 that of the next smaller number."""
    # Machler 2012, "Accurately computing log(1 - exp(-|a|))": expm1 near 0, log1p far from it.
    x_P = x_P.clamp(max=-torch.finfo(x_P.dtype).eps)
    is_near_P = x_P > -0.6931471805599453
    near_P = torch.log(-torch.expm1(torch.where(is_near_P, x_P, -1.0)))
    far_P = torch.log1p(-torch.exp(torch.where(is_near_P, -1.0, x_P)))
    return torch.where(is_near_P, near_P, far_P)
