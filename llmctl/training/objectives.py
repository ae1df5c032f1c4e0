"""Training objectives as functions `(model, batch) -> Loss`.

Next-token, masked-token, span and pair prediction are one objective: they differ only in the labels of a batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.config import ModelConfig, TrainConfig
from llmctl.losses.base import IGNORE, Loss
from llmctl.losses.cross_entropy import linear_cross_entropy
from llmctl.metrics.figures import Sums
from llmctl.metrics.scores import f1_score, matthews, pearson, spearman
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.corpus import Corpus


class Objective(nn.Module):
    """`forward(batch) -> Loss`, and the metrics computed from its sums over held-out rows.

    parts: additional sums of the loss; n_outputs: values kept per row in evaluation, for metrics that are not sums.
    """

    parts: tuple[str, ...] = ()
    n_outputs = 0
    progress = 0.0
    """The fraction of the steps that is done, set by the loop, for losses that change during training."""

    def figures(self, nats: float, count: float, parts: Mapping[str, float], outputs: NDArray[Any]) -> dict[str, float]:
        """Return the metrics of sums over held-out rows and of the outputs of every row (N, n_outputs): the loss."""
        del parts, outputs
        return {"loss": nats / max(count, 1.0)}


class LabelPrediction(Objective):
    """Cross-entropy on a batch's labels; head and loss run inside `forward`, so that DDP and FSDP wrap all of it.

    `token_bytes` (V,): UTF-8 bytes of each token, which make bits per byte comparable between tokenizers.
    """

    token_bytes: Tensor
    parts = ("bytes", "correct")

    def __init__(
        self, model: LanguageModel, token_bytes: Tensor, chunk_tokens: int, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens, self.label_smoothing = chunk_tokens, label_smoothing
        self.register_buffer("token_bytes", token_bytes, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return the loss summed over labels, with parts `bytes` and `correct`."""
        labels = batch["labels"].flatten()
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
        hidden_ND = self.model.hidden(**inputs).flatten(0, 1)
        places = (labels != IGNORE).nonzero().squeeze(1)
        if len(places) < len(labels):
            hidden_ND, labels = hidden_ND[places], labels[places]
        total, correct = linear_cross_entropy(
            self.model.head_input(hidden_ND),
            self.model.lm_head.weight,
            labels,
            bias_V=self.model.lm_head.bias,
            chunk_tokens=self.chunk_tokens,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            softcap=self.model.config.logits_softcap,
        )
        parts = {"bytes": self.token_bytes[labels].sum(dtype=torch.float64), "correct": correct}
        return Loss(total, torch.tensor(float(len(labels)), dtype=torch.float64, device=total.device), parts)

    def figures(self, nats: float, count: float, parts: Mapping[str, float], outputs: NDArray[Any]) -> dict[str, float]:
        """Return loss, perplexity, bits per byte and accuracy."""
        del outputs
        return Sums(nats, count, parts["bytes"], parts["correct"]).figures()


class Classification(Objective):
    """Classification or regression with a model's classification head.

    Batches have `labels` (B, 1), IGNORE for rows that do not count, and `targets` (B, K): the label's index; 0 or 1 for each
    of several labels; or a number. The loss is summed over rows: cross-entropy, binary cross-entropy (mean over the labels),
    or squared error.
    """

    parts = ("correct",)

    def __init__(self, model: LanguageModel, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        config = model.config
        self.n_outputs = 2 if config.problem == "single" else 2 * config.n_labels

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        """Return the loss summed over rows, with part `correct`; in evaluation also predictions and targets."""
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}
        return self.loss(self.model.classify(**inputs).float(), batch)

    def loss(
        self, logits_BL: Tensor, batch: dict[str, Tensor], more_B: Tensor | None = None, weight: float = 1.0
    ) -> Loss:
        """Return the loss of logits: `weight` times that of the labels, plus `more_B` per row."""
        counts_B1 = batch["labels"] != IGNORE
        targets = batch["targets"]
        if self.model.config.problem == "single":
            smoothing = self.label_smoothing if self.training else 0.0
            wanted_B = targets[:, 0].long()
            losses_B = F.cross_entropy(logits_BL, wanted_B, reduction="none", label_smoothing=smoothing)
            found = logits_BL.argmax(dim=1, keepdim=True).to(targets.dtype)
            right_B = found[:, 0] == targets[:, 0]
        elif self.model.config.problem == "multi":
            wanted_BL = targets.to(logits_BL.dtype)
            losses_B = F.binary_cross_entropy_with_logits(logits_BL, wanted_BL, reduction="none").mean(dim=1)
            found = (logits_BL > 0).to(targets.dtype)
            right_B = (found == targets).all(dim=1)
        else:
            losses_B = (logits_BL - targets.to(logits_BL.dtype)).square().mean(dim=1)
            found = logits_BL.to(targets.dtype)
            right_B = torch.zeros_like(losses_B, dtype=torch.bool)
        is_real_B = counts_B1[:, 0]
        if more_B is not None:
            losses_B = weight * losses_B + more_B
        return Loss(
            (losses_B * is_real_B).sum(dtype=torch.float64),
            counts_B1.sum(dtype=torch.float64),
            {"correct": (right_B & is_real_B).sum(dtype=torch.float64)},
            None if self.training else torch.cat([found, targets], dim=1),
        )

    def figures(self, nats: float, count: float, parts: Mapping[str, float], outputs: NDArray[Any]) -> dict[str, float]:
        """Return the loss, and accuracy, F1 and Matthews correlation, or Pearson and Spearman correlation."""
        figures = super().figures(nats, count, parts, outputs)
        half = outputs.shape[1] // 2
        found, wanted = outputs[:, :half], outputs[:, half:]
        if self.model.config.problem == "regression":
            columns = list(zip(found.T, wanted.T, strict=True))
            figures |= {
                "pearson": float(np.mean([pearson(a, b) for a, b in columns])),
                "spearman": float(np.mean([spearman(a, b) for a, b in columns])),
            }
        else:
            figures["accuracy"] = parts["correct"] / max(count, 1.0)
            if half == 1:
                figures["mcc"] = matthews(found[:, 0], wanted[:, 0])
                found, wanted = found[:, 0], wanted[:, 0]
            figures["f1"] = f1_score(found, wanted, self.model.config.n_labels)
        return figures | {"n_labels": int(count)}


def label_prediction(model: LanguageModel, corpus: Corpus, train: TrainConfig) -> LabelPrediction:
    """Return label prediction over a corpus's tokens."""
    return LabelPrediction(
        model, token_bytes_of(corpus, model.config), train.loss_chunk_tokens, label_smoothing=train.label_smoothing
    )


def token_bytes_of(corpus: Corpus, config: ModelConfig) -> Tensor:
    """Return the bytes of every token of a model's vocabulary (V,); padding rows have 0."""
    token_bytes = np.zeros(config.vocab_size, dtype=np.int32)
    known = corpus.tokenizer.for_output(config.family).token_bytes()
    token_bytes[: len(known)] = known
    return torch.from_numpy(token_bytes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
