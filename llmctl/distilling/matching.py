"""Matching a teacher's hidden states or attention relations, beside its predictions or instead of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.distilling.teacher import Seen, Teacher, inputs_of
from llmctl.losses.base import IGNORE, Loss
from llmctl.losses.matching import hidden_match, relation_match
from llmctl.model.attention import Attended
from llmctl.model.transformer import LanguageModel
from llmctl.training.objectives import Objective


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


def real_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which positions of the stack under the head are not padding, bool (B, T)."""
    name = "decoder_" if "decoder_input_ids_BT" in batch else ""
    documents_BT = batch.get(f"{name}documents_BT")
    return (
        torch.ones_like(batch[f"{name}input_ids_BT"], dtype=torch.bool) if documents_BT is None else documents_BT != 0
    )


class WithTeachers(Objective):
    """Base of the objectives with teachers: a student, its teachers, and what is matched between them."""

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
        # Relations are matched with the first teacher only; 0 asks the others for none.
        seen = [teacher.see(inputs, layer if place == 0 else 0) for place, teacher in enumerate(self.teachers)]
        same = next((place for place, teacher in enumerate(self.teachers) if teacher.model is self.model), None)
        if same is not None and attended is None:  # a teacher is measured itself: its states are known
            return seen[same].hidden_BTD, attended, seen
        return self.model.hidden(**inputs, attended=attended), attended, seen

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


class StateDistillation(WithTeachers):
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
