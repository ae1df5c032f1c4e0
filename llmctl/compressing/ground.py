"""A model with one vocabulary, a small sample of the data encoded for it, and the cost of changed models on that sample."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.artifacts.load import Loaded
from llmctl.config import DistillConfig
from llmctl.distilling.build_objective import build_objective
from llmctl.distilling.teacher import Teachers
from llmctl.formats.sentence_encoder import sentence_encoder
from llmctl.inference.encoding import encode_rows, longest_row
from llmctl.inference.rows import row_outputs
from llmctl.losses.logits import is_native
from llmctl.model.importance import Batches
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.corpus import CORPUS, keep_corpus, open_corpus
from llmctl.quantizing.bit_allocation import divergence, outputs_of
from llmctl.training.batch import to_device
from llmctl.training.objectives import Objective, evaluating
from llmctl.training.task_data import TaskData, prepare_task

ROWS = 8
"""Rows per forward pass."""


class Ground:
    """What models are measured on.

    config: of a distillation with the model as its teacher, on the sample. base: the model without its weights. original:
    the ground of the whole vocabulary, if `base` has another one.
    """

    def __init__(self, config: DistillConfig, base: Loaded, folder: Path, original: "Ground | None" = None) -> None:
        self.config, self.base, self.original = config, base, original
        if not (folder / CORPUS).is_file():
            keep_corpus(prepare_task(config, base, folder, lambda _: None), folder)
        self.data = TaskData.open(config, base, open_corpus(folder), lambda _: None)

    @cached_property
    def teachers(self) -> Teachers:
        """The model itself, which others are compared with."""
        return Teachers(self.config)

    @property
    def predicts_tokens(self) -> bool:
        """Whether models are compared by the tokens that they predict."""
        return not self.base.model.config.n_labels and self.config.loss.name != "none"

    @property
    def has_labels(self) -> bool:
        """Whether models are compared by the labels that they predict; else by pooled states of texts."""
        return self.base.model.config.n_labels > 0

    def batches(self, n_rows: int) -> list[dict[str, Tensor]]:
        """Return training batches."""
        return self.data.some_batches(self.base.model.config, n_rows)

    @cached_property
    def held_out(self) -> list[dict[str, Tensor]]:
        """All held-out batches."""
        source, cpu = self.data.batches(self.base.model.config, shuffle=False), torch.device("cpu")
        starts = range(0, source.n_rows, ROWS)
        return [to_device(source.batch(range(at, min(at + ROWS, source.n_rows))), cpu) for at in starts]

    def loss(self, model: LanguageModel) -> tuple[float, float]:
        """Return a model's loss on the held-out batches in nats, and the number of labels; 0 where no tokens are predicted."""
        if not self.predicts_tokens:
            return 0.0, self.n_labels()
        objective = build_objective(self.config, self.data, self.teachers, model, is_plain=True)
        with torch.no_grad(), narrow(), evaluating(model):
            return summed(objective, self.held_out)

    def divergence(self, model: LanguageModel, n_batches: int | None = None) -> float:
        """Return how far a model's predictions are from those of the model itself, in all.

        The KL divergence of tokens or labels in nats; for sentence encoders 1 - cosine similarity of pooled states. n_batches:
        of the held-out ones; None is all.
        """
        with torch.no_grad(), narrow(), evaluating(model):
            if self.has_labels:
                return self._of_labels(model, n_batches)
            if not self.predicts_tokens:
                states_ND, own_ND = self.pooled(model), self.reference
                return float((1 - F.cosine_similarity(states_ND, own_ND)).sum())
            return sum(
                divergence(model, own, outputs_of(model, batch))
                for batch, own in zip(self.held_out[:n_batches], self.own_outputs[:n_batches], strict=True)
            )

    def mean_divergence(self, model: LanguageModel, n_batches: int | None = None) -> float:
        """Return the divergence per prediction or state."""
        return self.divergence(model, n_batches) / max(self.n_labels(n_batches), 1.0)

    def n_labels(self, n_batches: int | None = None) -> float:
        """Return the number of predictions or states on held-out batches."""
        if self.has_labels:
            return float(sum(len(batch["input_ids_BT"]) for batch in self.held_out[:n_batches]))
        if not self.predicts_tokens:
            return float(len(self.texts))
        return float(sum(len(own) for own, _ in self.own_outputs[:n_batches]))

    @cached_property
    def own_outputs(self) -> list[tuple[Tensor, Tensor | None]]:
        """The states before the head of the model itself on the held-out batches, with the head's weight."""
        model = self.teachers.on_cpu().original().model
        with torch.no_grad(), narrow(), evaluating(model):
            found = [outputs_of(model, batch) for batch in self.held_out]
        weight = found[0][1] if found else None
        return [(states, weight) for states, _ in found]  # one copy of the weight

    @cached_property
    def texts(self) -> list[str]:
        """The held-out texts."""
        if self.original is not None:
            return self.original.texts
        corpus = self.data.corpus
        return [corpus.tokenizer.decode(corpus.documents.document(int(index)).tolist()) for index in corpus.held_out]

    @cached_property
    def reference(self) -> Tensor:
        """The pooled states (N, D) of the texts by the original model."""
        if self.original is not None:
            return self.original.reference
        return self.pooled(self.teachers.on_cpu().original().model)

    def pooled(self, model: LanguageModel) -> Tensor:
        """Return the pooled states (N, D) of the texts, pooled as the model is used."""
        loaded = Loaded(model, self.base.tokenizer, self.base.artifact)
        own = sentence_encoder(self.base.artifact.files)
        rows = encode_rows(loaded, [(own.prompt + text,) for text in self.texts], longest_row(loaded, 0))
        return row_outputs(loaded, rows, 2 * ROWS, pooling=own.pooling or "mean")

    def remember(self) -> None:
        """Compute what models are compared with: before the model itself is changed for a while."""
        if self.predicts_tokens:
            assert self.own_outputs
        elif not self.has_labels:
            assert len(self.reference)

    def _of_labels(self, model: LanguageModel, n_batches: int | None) -> float:
        teacher, total = self.teachers.on_cpu().original().model, 0.0
        for batch in self.held_out[:n_batches]:
            inputs: dict[str, Any] = {name: one for name, one in batch.items() if name not in ("labels", "targets")}
            own_BL, other_BL = teacher.classify(**inputs).float(), model.classify(**inputs).float()
            if model.config.problem == "single":
                own_BL, other_BL = own_BL.log_softmax(dim=1), other_BL.log_softmax(dim=1)
                total += float((own_BL.exp() * (own_BL - other_BL)).sum())
            elif model.config.problem == "multi":
                p_BL = own_BL.sigmoid()
                entropy = F.binary_cross_entropy_with_logits
                total += float(entropy(other_BL, p_BL, reduction="sum") - entropy(own_BL, p_BL, reduction="sum"))
            else:
                total += float((own_BL - other_BL).square().sum()) / 2
        return total


def narrow() -> Any:
    """Return the context in which models are run: bfloat16 where that is fast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=is_native(torch.bfloat16))


def summed(objective: Objective, batches: Batches) -> tuple[float, float]:
    """Return an objective's loss and count over batches, in evaluation mode."""
    objective.eval()
    total = count = 0.0
    for batch in batches:
        loss = objective(dict(batch))
        total, count = total + float(loss.sum), count + float(loss.count)
    return total, count
