"""Distillation of classifiers: a teacher's distribution over labels, or its numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.config import DistillLossConfig
from llmctl.distilling.teacher import Teacher, inputs_of
from llmctl.losses.base import Loss
from llmctl.model.transformer import LanguageModel
from llmctl.training.objectives import Classification


class LabelDistillation(Classification):
    """Divergence from a teacher's distribution over labels, or from its numbers, mixed with the data's labels.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; multi-label: a Bernoulli distribution per label.
    """

    def __init__(
        self, model: LanguageModel, teachers: Sequence[Teacher], config: DistillLossConfig, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(model, label_smoothing)
        self.teachers, self.config = tuple(teachers), config

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return the loss summed over rows; in evaluation only that of the labels."""
        inputs = inputs_of(batch)
        logits_BL = self.model.classify(**inputs).float()
        if not self.training:
            return self.loss(logits_BL, batch)
        # In float32: a difference of half-precision logits loses what a close student still has to learn.
        with torch.no_grad():
            outputs = [teacher.model.classify(**inputs).float() for teacher in self.teachers]
        weight = self.config.weight
        return self.loss(logits_BL, batch, weight * self.divergence(logits_BL, outputs), 1 - weight)

    def divergence(self, logits_BL: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Return the divergence of the student from its teachers, per row."""
        problem, temperature = self.model.config.problem, self.config.temperature
        if problem == "regression":
            return (logits_BL - torch.stack(list(outputs)).mean(dim=0)).square().mean(dim=1)
        if problem == "multi":
            # Independent labels: a Bernoulli divergence each, with teachers averaged as probabilities.
            own_BL = logits_BL / temperature
            want_BL = torch.stack([torch.sigmoid(one / temperature) for one in outputs]).mean(dim=0)
            floor_BL = F.binary_cross_entropy(want_BL, want_BL, reduction="none")
            losses_BL = F.binary_cross_entropy_with_logits(own_BL, want_BL, reduction="none") - floor_BL
            return temperature**2 * losses_BL.mean(dim=1)
        want_BL = torch.stack([(one / temperature).softmax(dim=1) for one in outputs]).mean(dim=0)
        own_BL = (logits_BL / temperature).log_softmax(dim=1)
        return temperature**2 * (torch.xlogy(want_BL, want_BL) - want_BL * own_BL).sum(dim=1)
