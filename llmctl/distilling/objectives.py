"""Distillation of language models: a teacher's distribution over tokens, mixed with the data's labels.

The teacher runs inside `forward` but is not a submodule, so that DDP and FSDP see only the student. Cached teacher outputs
can replace it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.config import DistillLossConfig
from llmctl.distilling.matching import Matching, WithTeachers
from llmctl.distilling.on_policy import AnswerWriter, Writer
from llmctl.distilling.teacher import Seen, Teacher
from llmctl.losses.base import IGNORE, Loss
from llmctl.losses.cross_entropy import linear_cross_entropy
from llmctl.losses.divergences import Divergence
from llmctl.losses.linear_divergence import TeacherOutputs, linear_divergence
from llmctl.losses.measures import N_BINS
from llmctl.losses.teachers import DenseTeacher, SparseTeacher
from llmctl.metrics.figures import Sums
from llmctl.model.transformer import LanguageModel

BINS = tuple(f"bin_{what}_{place}" for what in ("count", "confidence", "correct") for place in range(N_BINS))
MEASURED = ("kl", "agreement", "overlap", *BINS)


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


class Distillation(WithTeachers):
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
        writer: Writer | AnswerWriter | None = None,
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
            softcap=self.model.config.logits_softcap,
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
            self.model.head_input(hidden_ND),
            head.weight,
            labels,
            bias_V=head.bias,
            chunk_tokens=self.chunk_tokens,
            softcap=self.model.config.logits_softcap,
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
