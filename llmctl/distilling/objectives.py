"""Distillation objectives: a teacher's distribution over tokens or labels, or its hidden states.

The teacher runs inside `forward` but is not a submodule, so that DDP and FSDP see only the student. Cached teacher outputs
can replace it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from llmctl.config import DistillLossConfig
from llmctl.distilling.on_policy import Writer
from llmctl.distilling.teacher import Seen, Teacher, inputs_of
from llmctl.losses.base import IGNORE, Loss
from llmctl.losses.cross_entropy import linear_cross_entropy
from llmctl.losses.divergences import Divergence
from llmctl.losses.linear_divergence import TeacherOutputs, linear_divergence
from llmctl.losses.matching import hidden_match, relation_match
from llmctl.losses.measures import N_BINS
from llmctl.losses.teachers import DenseTeacher, SparseTeacher
from llmctl.metrics.figures import Sums
from llmctl.model.attention import Attended
from llmctl.model.transformer import LanguageModel
from llmctl.training.objectives import Classification, Objective

BINS = tuple(f"bin_{what}_{place}" for what in ("count", "confidence", "correct") for place in range(N_BINS))
MEASURED = ("kl", "agreement", "overlap", *BINS)


@dataclass(frozen=True)
class Matching:
    """What is matched besides predictions: `hidden`, `relation` or `none`.

    labels_frac: labels per position, which scales a sum over positions to one over labels, so that both are divided by the
    same count, however a batch is split. channels: the teacher's hidden channels that the student has; None is all of them.
    """

    kind: str = "none"
    weight: float = 1.0
    layer: int = 0
    relation_heads: int = 0
    labels_frac: float = 1.0
    channels: Tensor | None = None


def make_divergence(config: DistillLossConfig, progress: float = 0.0) -> Divergence:
    """Return the divergence of a config; `progress` moves TAID's target from the student to the teacher."""
    share = config.taid_start + (1 - config.taid_start) * progress
    return Divergence(
        config.name,
        temperature=config.temperature,
        beta=config.beta,
        skew=config.skew,
        head_mass=config.head_mass,
        taid_share=share,
    )


def calibration_error(bins_3N: NDArray[Any]) -> float:
    """Return the expected calibration error of (count, sum of confidences, number correct) per bin.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
    """
    count = float(bins_3N[0].sum())
    return float(np.abs(bins_3N[1] - bins_3N[2]).sum()) / max(count, 1.0)


def real_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of the stack under the head are not padding, bool (B, T)."""
    name = "decoder_" if "decoder_input_ids_BT" in batch else ""
    documents_BT = batch.get(f"{name}documents_BT")
    return (
        torch.ones_like(batch[f"{name}input_ids_BT"], dtype=torch.bool) if documents_BT is None else documents_BT != 0
    )


class _WithTeachers(Objective):
    """Shared by the objectives below: a student, its teachers, and what is matched between them."""

    def __init__(self, model: LanguageModel, teachers: Sequence[Teacher], matching: Matching) -> None:
        super().__init__()
        self.model = model
        self.teachers = tuple(teachers)
        self.matching = matching

    def see(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Attended | None, list[Seen]]:
        """Return the student's hidden states, the queries, keys and values of its last layer, and the teachers' outputs."""
        inputs = inputs_of(batch)
        attended: Attended | None = None
        layer = 0
        if self.matching.kind == "relation":
            # Asks the last layer of the stack under the head to leave its queries, keys and values here.
            attended = {len(self.model.stacks()[-1].layers) - 1: None}
            layer = self.matching.layer
        hidden_BTD = self.model.hidden(**inputs, attended=attended)
        # Relations are matched with the first teacher only; 0 asks the others for none.
        seen = [teacher.see(inputs, layer if place == 0 else 0) for place, teacher in enumerate(self.teachers)]
        return hidden_BTD, attended, seen

    def matched(
        self, batch: Mapping[str, Tensor], hidden_BTD: Tensor, attended: Attended | None, seen: Sequence[Seen]
    ) -> Tensor:
        """Return what is matched, summed over positions and scaled to labels."""
        matching = self.matching
        valid_BT = real_positions(batch)
        if matching.kind == "hidden":
            teacher_BTD = seen[0].hidden_BTD
            if matching.channels is not None:
                teacher_BTD = teacher_BTD[..., matching.channels.to(teacher_BTD.device)]
            total = hidden_match(hidden_BTD[valid_BT], teacher_BTD[valid_BT])
        else:
            assert attended is not None
            (own,) = attended.values()
            assert own is not None
            assert seen[0].qkv is not None
            name = "decoder_" if "decoder_input_ids_BT" in batch else ""
            total = relation_match(
                own,
                seen[0].qkv,
                matching.relation_heads,
                batch.get(f"{name}documents_BT"),
                causal=self.model.config.family != "encoder",
            )
        return matching.weight * matching.labels_frac * total


class Distillation(_WithTeachers):
    """Divergence from a teacher's distribution over the vocabulary at every label, mixed with cross-entropy.

    The held-out loss is the cross-entropy on the data, as everywhere, so that metrics compare; KL divergence and agreement
    with the teacher are reported next to it.
    """

    token_bytes: Tensor

    def __init__(
        self,
        model: LanguageModel,
        teachers: Sequence[Teacher],
        config: DistillLossConfig,
        token_bytes: Tensor,
        *,
        matching: Matching | None = None,
        chunk_tokens: int = 256,
        vocab_size: int = 0,
        writer: Writer | None = None,
        head: DenseTeacher | None = None,
    ) -> None:
        super().__init__(model, teachers, matching or Matching())
        self.config, self.chunk_tokens, self.writer = config, chunk_tokens, writer
        self.vocab_size = vocab_size or None
        self.head = head
        self.parts = ("bytes", "correct", "nats", *(MEASURED if self.teachers else ()))
        self.register_buffer("token_bytes", token_bytes, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return the loss summed over labels; in evaluation also the comparison with the teacher."""
        # Before the batch is replaced: the loop has counted these labels.
        n_given = (batch["labels"] != IGNORE).sum()
        if self.training and self.writer is not None:
            batch = self.writer.write(self.model, batch)
        hidden_BTD, attended, seen = self.see(batch)
        labels = batch["labels"].flatten()
        places = (labels != IGNORE).nonzero().squeeze(1)
        # Only labeled positions reach the head: of masked text that is a small part.
        hidden_ND, labels = hidden_BTD.flatten(0, 1)[places], labels[places]
        outputs = self.teacher_outputs(batch, seen, places)
        if outputs is None:
            return self.loss_without_teacher(hidden_ND, labels)
        sums = linear_divergence(
            self.model.head_input(hidden_ND),
            self.model.lm_head.weight,
            outputs,
            labels,
            # In evaluation TAID's target is the teacher itself, so that losses of all steps compare.
            make_divergence(self.config, self.progress if self.training else 1.0),
            weight=self.config.weight,
            bias_V=self.model.lm_head.bias,
            chunk_tokens=self.chunk_tokens,
            vocab_size=self.vocab_size,
            measure=not self.training and bool(self.teachers),
        )
        # `nats` keeps the data's cross-entropy apart from the mixed loss, for the held-out loss.
        total = sums.total
        if self.matching.kind != "none":
            total = total + self.matched(batch, hidden_BTD, attended, seen)
        if self.training and self.writer is not None:
            # The loop divides by the number of labels in the data; generated rows have fewer.
            total = total * (n_given / max(1, len(labels)))
        parts = {
            "bytes": self.token_bytes[labels].sum(dtype=torch.float64),
            "correct": sums.correct,
            "nats": sums.cross_entropy,
        }
        if sums.measures is not None:
            found = sums.measures
            parts |= {"kl": found.kl, "agreement": found.agreement, "overlap": found.overlap}
            parts |= dict(zip(BINS, found.bins.flatten(), strict=True))
        return Loss(total, torch.tensor(float(len(labels)), dtype=torch.float64, device=total.device), parts)

    def teacher_outputs(
        self, batch: Mapping[str, Tensor], seen: Sequence[Seen], places: Tensor
    ) -> TeacherOutputs | None:
        """Return the teachers' outputs at the labels, live or cached."""
        if "teacher_ids" in batch:
            return SparseTeacher(batch["teacher_ids"], batch["teacher_probs"], batch.get("teacher_tail"))
        if "teacher_hidden" in batch:
            assert self.head is not None
            # NumPy batches have no bfloat16: cached values stored in it are reinterpreted.
            return [replace(self.head, hidden_ND=batch["teacher_hidden"].to(self.head.weight_VD.dtype))]
        if not self.teachers:
            return None
        return [
            teacher.dense(view.hidden_BTD.flatten(0, 1)[places])
            for teacher, view in zip(self.teachers, seen, strict=True)
        ]

    def loss_without_teacher(self, hidden_ND: Tensor, labels: Tensor) -> Loss:
        """Return the cross-entropy of the labels if there is no teacher: held-out rows with a cache."""
        head = self.model.lm_head
        nats, correct = linear_cross_entropy(
            self.model.head_input(hidden_ND), head.weight, labels, bias_V=head.bias, chunk_tokens=self.chunk_tokens
        )
        parts = {"bytes": self.token_bytes[labels].sum(dtype=torch.float64), "correct": correct, "nats": nats}
        return Loss(nats, torch.tensor(float(len(labels)), dtype=torch.float64, device=nats.device), parts)

    def figures(self, nats: float, count: float, parts: Mapping[str, float], outputs: NDArray[Any]) -> dict[str, float]:
        """Return the metrics of label prediction, and those that compare teacher and student."""
        del outputs
        labels = max(count, 1.0)
        figures = Sums(parts["nats"], count, parts["bytes"], parts["correct"]).figures()
        if not self.teachers:
            return figures
        # Every part is a sum over labels, divided once.
        figures["distill_loss"] = nats / labels
        figures |= {name: parts[name] / labels for name in ("kl", "agreement", "overlap")}
        bins_3N = np.array([parts[name] for name in BINS]).reshape(3, N_BINS)
        return figures | {"calibration_error": calibration_error(bins_3N)}


class StateDistillation(_WithTeachers):
    """Match a teacher's hidden states, for a teacher without a prediction head (a sentence encoder).

    Masked tokens are restored first: nothing is predicted.
    """

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return what is matched, summed over positions and scaled to labels."""
        labels_BT = batch["labels"]
        whole = dict(batch) | {"input_ids_BT": torch.where(labels_BT == IGNORE, batch["input_ids_BT"], labels_BT)}
        hidden_BTD, attended, seen = self.see(whole)
        total = self.matched(whole, hidden_BTD, attended, seen).double()
        return Loss(total, (labels_BT != IGNORE).sum(dtype=torch.float64), {})


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
