"""What is learned: objectives as `(model, batch) -> Loss`, and the table that names them.

Next token, masked token, span and pair prediction are one function: they differ in which labels a batch carries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import Family
from llmctl.losses import IGNORE, Loss, linear_cross_entropy
from llmctl.model.transformer import LanguageModel


@dataclass(frozen=True)
class ObjectiveRow:
    """An objective: which model it trains by default, what it is, where it comes from."""

    families: tuple[Family, ...]
    summary: str
    source: str


OBJECTIVES: dict[str, ObjectiveRow] = {
    "clm": ObjectiveRow(("decoder",), "predict the next token", "GPT, Radford et al. 2018"),
    "mlm": ObjectiveRow(("encoder",), "predict masked tokens", "BERT, arXiv:1810.04805"),
    "span": ObjectiveRow(("encoder_decoder",), "write out the spans cut out of a text", "T5, arXiv:1910.10683"),
    "seq2seq": ObjectiveRow(
        ("encoder_decoder",), "map a source text to a target text", "Vaswani et al., arXiv:1706.03762"
    ),
}


class LabelPrediction(nn.Module):
    """Predict a batch's labels with a model; head and loss run inside `forward`, so that wrappers see all of it.

    `token_bytes` (V,) are the UTF-8 bytes of each token: their sum over the labels makes bits per byte comparable
    between tokenizers.
    """

    token_bytes: Tensor

    def __init__(self, model: LanguageModel, token_bytes: Tensor, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
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
        )
        parts = {"bytes": self.token_bytes[labels].sum(dtype=torch.float64), "correct": correct}
        return Loss(total, torch.tensor(float(len(labels)), dtype=torch.float64, device=total.device), parts)
