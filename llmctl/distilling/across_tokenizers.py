"""Distillation from a teacher with another tokenizer: the objective, and the teacher's outputs for a student's batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.config import DistillLossConfig
from llmctl.distilling.alignment import Aligned, Aligner
from llmctl.distilling.answer_alignment import align_answers
from llmctl.distilling.objectives import Distillation, make_divergence
from llmctl.distilling.on_policy import AnswerWriter, Writer
from llmctl.distilling.teacher import READ, Teacher
from llmctl.distilling.vocabulary_map import map_vocabularies
from llmctl.losses.across import AcrossTeacher, Events, Inside, across_divergence, chunk_likelihood
from llmctl.losses.base import IGNORE, Loss
from llmctl.losses.divergences import Divergence
from llmctl.losses.linear_divergence import DivergenceSums
from llmctl.losses.log_probs import linear_log_probs
from llmctl.model.transformer import LanguageModel
from llmctl.tokenizer.base import Tokenizer

ALM_TEMPERATURE = 100.0
"""As in the authors' implementation (tokenkit): long chunks are not less likely by orders of magnitude."""


@dataclass(frozen=True)
class Reading:
    """What the teachers made of a batch: its tokens in theirs, and their hidden states (B, S, D)."""

    aligned: Aligned
    states: list[Tensor]


class AcrossTokenizers(Distillation):
    """A divergence from teachers that read the same text in other tokens, mixed with cross-entropy.

    ends: the student's and the teacher's token that ends an answer. The held-out loss is that of the data.
    """

    def __init__(
        self,
        model: LanguageModel,
        teachers: Sequence[Teacher],
        config: DistillLossConfig,
        token_bytes: Tensor,
        tokenizers: tuple[Tokenizer, Tokenizer],
        *,
        chunk_tokens: int = 256,
        writer: Writer | AnswerWriter | None = None,
        ends: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(model, (), config, token_bytes, chunk_tokens=chunk_tokens, writer=writer)
        self.parts = (*self.parts, "kl")
        student, teacher = tokenizers
        self.readers = tuple(teachers)
        family, shape = model.config.family, teachers[0].model.config
        own, other = student.for_output(family), teacher.for_output(family)
        self.aligner = Aligner(own, other, family, shape.max_positions)
        is_pair = family == "encoder_decoder"
        self.sources = Aligner(student, teacher, family, shape.max_positions) if is_pair else None
        if family == "encoder_decoder":
            self.aligner.specials[model.config.decoder_start_id] = shape.decoder_start_id
        if ends is not None:
            self.aligner.specials[ends[0]] = ends[1]
        self.map = map_vocabularies(own, other, self.aligner.specials)
        self.events: Events | None = None

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return the loss summed over labels; in evaluation the cross-entropy of the data, and the KL divergence over events."""
        if self.training and self.config.weight == 0:
            return self.without_kl(super().forward(batch))
        n_given = (batch["labels"] != IGNORE).sum()
        if self.training and self.writer is not None:
            batch = self.writer.write(self.model, batch)
        hidden_BTD = self.see(batch)[0]
        reading = self.read(batch)
        places = (batch["labels"].flatten() != IGNORE).nonzero().squeeze(1)
        labels = batch["labels"].flatten()[places]
        hidden_ND = hidden_BTD.flatten(0, 1)[places]
        if not self.training:
            return self.measured(hidden_ND, labels, self.targets(batch, reading, places))
        if self.config.across == "alm":
            total, nats = self.chunks(batch, reading, hidden_ND, labels, places)
            correct = nats.new_zeros(())
        else:
            sums = self.divergence(
                hidden_ND,
                labels,
                self.targets(batch, reading, places),
                make_divergence(self.config, self.progress),
                weight=self.config.weight,
                is_sorted=self.config.across == "uld",
            )
            total, nats, correct = sums.total, sums.cross_entropy, sums.correct
        if self.writer is not None:  # see `Distillation`
            total = total * (n_given / max(1, len(labels)))
        parts = {"bytes": self.token_bytes[labels].sum(dtype=torch.float64), "correct": correct, "nats": nats}
        count = torch.tensor(float(len(labels)), dtype=torch.float64, device=total.device)
        return self.without_kl(Loss(total, count, parts))

    def without_kl(self, loss: Loss) -> Loss:
        """Return a loss of training, where the divergence is not measured apart."""
        return replace(loss, parts=loss.parts | {"kl": torch.zeros_like(loss.count)})

    def divergence(
        self, hidden_ND: Tensor, labels: Tensor, targets: AcrossTeacher, divergence: Divergence, **options: Any
    ) -> DivergenceSums:
        """Return the divergence of the student's labels from what the teachers tell of them."""
        head = self.model.lm_head
        return across_divergence(
            self.model.head_input(hidden_ND),
            head.weight,
            targets,
            labels,
            divergence,
            bias_V=head.bias,
            chunk_tokens=self.chunk_tokens,
            softcap=self.model.config.logits_softcap,
            **options,
        )

    def measured(self, hidden_ND: Tensor, labels: Tensor, targets: AcrossTeacher) -> Loss:
        """Return the cross-entropy of held-out labels, and their KL divergence as far as the teacher tells it."""
        sums = self.divergence(hidden_ND, labels, targets, Divergence())
        parts = {
            "bytes": self.token_bytes[labels].sum(dtype=torch.float64),
            "correct": sums.correct,
            "nats": sums.cross_entropy,
            "kl": sums.divergence,
        }
        count = torch.tensor(float(len(labels)), dtype=torch.float64, device=labels.device)
        return Loss(sums.cross_entropy, count, parts)

    def figures(self, nats: float, count: float, parts: Mapping[str, float], outputs: NDArray[Any]) -> dict[str, float]:
        """Return the metrics of label prediction, and the KL divergence from the teacher per label."""
        return super().figures(nats, count, parts, outputs) | {"kl": parts["kl"] / max(count, 1.0)}

    def read(self, batch: Mapping[str, Tensor]) -> Reading:
        """Return a batch as the teachers read it."""
        device = batch["labels"].device
        inputs: dict[str, Tensor] = {}
        prefix = ""
        if self.sources is not None:
            prefix = "decoder_"
            inputs = tensors(align(self.sources, batch, ""), "", device)
        if READ[0] in batch:
            aligned = align_answers(self.aligner, {name: tensor.cpu().numpy() for name, tensor in batch.items()})
        else:
            aligned = align(self.aligner, batch, prefix)
        inputs |= tensors(aligned, prefix, device)
        return Reading(aligned, [teacher.see(inputs).hidden_BTD for teacher in self.readers])

    def targets(self, batch: Mapping[str, Tensor], reading: Reading, places: Tensor) -> AcrossTeacher:
        """Return the teachers' outputs at labels; places: their positions in the flattened batch."""
        device = places.device
        if self.events is None or self.events.student_V.device != device:
            found = self.map
            self.events = Events.of(
                torch.from_numpy(found.student_event).to(device),
                torch.from_numpy(found.teacher_event).to(device),
                found.n_events,
            )
        aligned = reading.aligned
        at = places.cpu().numpy()
        rows, positions = np.divmod(at, aligned.place_BT.shape[1])
        begin_N, place_N = aligned.begin_BT[rows, positions], aligned.place_BT[rows, positions]
        ids_BT = batch[self.own_ids].cpu().numpy()
        inside: dict[int, Inside] = {}
        beyond_N2 = np.full((len(at), 2), -1, dtype=np.int64)
        labels_N = batch["labels"].flatten()[places].cpu().numpy()
        for label in np.flatnonzero((place_N < 0) & (begin_N >= 0)).tolist():
            row, first, last = int(rows[label]), int(begin_N[label]), int(positions[label])
            tokens, events = self.map.continuations(tuple(ids_BT[row, first + 1 : last + 1].tolist()))
            if (events >= 0).any():
                place_N[label] = aligned.place_BT[row, first]
                inside[label] = Inside(torch.from_numpy(tokens).to(device), torch.from_numpy(events).to(device))
        for label in np.flatnonzero(place_N >= 0).tolist():
            row, first, last = int(rows[label]), int(begin_N[label]), int(positions[label])
            following = int(place_N[label]) + 1
            if following < aligned.ids_BS.shape[1]:
                written = tuple(ids_BT[row, first + 1 : last + 1].tolist())
                beyond_N2[label] = self.map.beyond(int(aligned.ids_BS[row, following]), written, int(labels_N[label]))
        index_N = torch.from_numpy(rows * aligned.ids_BS.shape[1] + np.maximum(place_N, 0)).to(device)
        dense = [
            teacher.dense(states.flatten(0, 1)[index_N])
            for teacher, states in zip(self.readers, reading.states, strict=True)
        ]
        beyond = torch.from_numpy(beyond_N2).to(device)
        has_place_N = torch.from_numpy(place_N >= 0).to(device)
        return AcrossTeacher(dense, self.events, has_place_N, inside, beyond[:, 0], beyond[:, 1])

    @property
    def own_ids(self) -> str:
        """The name of the ids that the student's decoder reads."""
        return "input_ids_BT" if self.sources is None else "decoder_input_ids_BT"

    def chunks(
        self, batch: Mapping[str, Tensor], reading: Reading, hidden_ND: Tensor, labels: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of chunk likelihoods mixed with cross-entropy, and the cross-entropy alone."""
        device = labels.device
        head, softcap = self.model.lm_head, self.model.config.logits_softcap
        log_q_N = linear_log_probs(
            self.model.head_input(hidden_ND),
            head.weight,
            labels,
            bias_V=head.bias,
            chunk_tokens=self.chunk_tokens,
            softcap=softcap,
        )
        own, other, n_chunks = chunks_of(reading.aligned, batch["labels"].cpu().numpy())
        chunk_of_N = torch.from_numpy(own).to(device).flatten()[places]
        others = torch.from_numpy(other).to(device).flatten()
        used = (others >= 0).nonzero().squeeze(1)
        next_M = torch.from_numpy(reading.aligned.ids_BS).to(device).flatten().roll(-1)[used]
        with torch.no_grad():
            log_p = [
                linear_log_probs(
                    outputs.hidden_ND,
                    outputs.weight_VD,
                    next_M,
                    bias_V=outputs.bias_V,
                    chunk_tokens=self.chunk_tokens,
                    softcap=outputs.softcap,
                )
                for teacher, states in zip(self.readers, reading.states, strict=True)
                for outputs in [teacher.dense(states.flatten(0, 1)[used])]
            ]
            log_p_M = torch.stack(log_p).exp().mean(dim=0).log() if len(log_p) > 1 else log_p[0]
        nats = -log_q_N.sum(dtype=torch.float64)
        losses_X = chunk_likelihood(
            log_q_N, log_p_M.to(log_q_N.dtype), chunk_of_N, others[used], n_chunks, ALM_TEMPERATURE
        )
        weight = self.config.weight
        return weight * losses_X.sum(dtype=torch.float64) + (1 - weight) * nats, nats.detach()


def align(aligner: Aligner, batch: Mapping[str, Tensor], prefix: str) -> Aligned:
    """Align one side of a batch."""
    documents = batch.get(f"{prefix}documents_BT")
    return aligner.align(
        batch[f"{prefix}input_ids_BT"].cpu().numpy(), None if documents is None else documents.cpu().numpy()
    )


def tensors(aligned: Aligned, prefix: str, device: torch.device) -> dict[str, Tensor]:
    """Return the teacher's inputs of one side."""
    found: dict[str, Any] = {f"{prefix}input_ids_BT": torch.from_numpy(aligned.ids_BS).to(device)}
    if (aligned.documents_BS != 1).any():
        found[f"{prefix}documents_BT"] = torch.from_numpy(aligned.documents_BS).to(device)
    return found


def chunks_of(aligned: Aligned, labels_BT: Any) -> tuple[Any, Any, int]:
    """Return the chunk of each of the student's (B, T) and the teacher's positions (B, S), -1 for none, and their number.

    A chunk is the text between two places at which tokens of both end; a position belongs to the chunk of its next token.
    """
    own = np.full_like(aligned.place_BT, -1)
    other = np.full_like(aligned.ids_BS, -1)
    number = 0
    for row, place_T in enumerate(aligned.place_BT):
        ends = np.flatnonzero(place_T >= 0)
        for first, last in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            begin, end = int(place_T[first]), int(place_T[last])
            if end > begin and (labels_BT[row, first:last] != IGNORE).all():
                own[row, first:last] = number
                other[row, begin:end] = number
                number += 1
    return own, other, number
