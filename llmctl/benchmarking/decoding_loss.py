"""What decoding costs in quality: the loss of a text written token by token, beside that of reading it without rounding.

The step that writes may round what a model's file does not: compiled, the inputs of coded weights to 8 bits in blocks; by
torch, to bfloat16 where a product is faster so; keys and values with `--kv int8`. So the text is read with the weights
multiplied out in float32, and then each of its tokens is given to the step, whatever the model would have written.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.artifacts.load import Loaded
from llmctl.data.sources import read_documents
from llmctl.errors import UsageError
from llmctl.inference.encoding import require_tokenizer
from llmctl.inference.session import Session
from llmctl.kernels.compiled_step import MOST_ROWS
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

ROW_TOKENS = 256
"""Tokens of each of the rows, which are as many as the compiled step takes."""
TOKEN_CHARACTERS = 16
"""More characters than a token has on the average, so that of a long text no more than its beginning is encoded."""


@dataclass(frozen=True)
class Read:
    """Nats per token of a text (B, T) that is read, and the likeliest token at each place but the first (B, T-1)."""

    loss: float
    best_BT: Tensor


@dataclass(frozen=True)
class StepLoss:
    """Nats per token of a text that is read, and written; and of what share of the tokens the same one is likeliest."""

    read: float
    written: float
    same_best_frac: float
    n_tokens: int

    @property
    def perplexity_change(self) -> float:
        """By what share writing raises the perplexity."""
        return math.expm1(self.written - self.read)


def rows_of(loaded: Loaded, path: str) -> Tensor:
    """Return the beginning of a text as rows of one length (B, T), each begun as the model's texts are.

    Raises: UsageError for a model that is no decoder, or a text that is too short.
    """
    tokenizer, config = require_tokenizer(loaded), loaded.model.config
    if config.family != "decoder":
        raise UsageError(f"`{loaded.artifact.path}` goes on from no text", "--data is for decoders")
    head = [tokenizer.bos_id] if loaded.begins_with_bos and tokenizer.bos_id is not None else []
    room, ids = min(ROW_TOKENS, config.max_positions) - len(head), list[int]()
    for text in read_documents([path]):
        ids += tokenizer.encode(text[: MOST_ROWS * ROW_TOKENS * TOKEN_CHARACTERS])
        if len(ids) >= MOST_ROWS * room:
            break
    room = min(room, len(ids) // MOST_ROWS)
    if room < 2:
        raise UsageError(f"`{path}` has {len(ids)} tokens, too few to measure a loss", "name a longer text")
    return torch.tensor([[*head, *ids[start : start + room]] for start in range(0, MOST_ROWS * room, room)])


@torch.inference_mode()
def read_rows(model: LanguageModel, ids_BT: Tensor) -> Read:
    """Measure the loss of all tokens but the first of each row, a row at a time."""
    nats, best = 0.0, []
    for ids_1T in ids_BT.split(1):
        logits_TV = model(ids_1T)[0, :-1].float()
        nats += float(F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum"))
        best.append(logits_TV.argmax(dim=1))
    best_BT = torch.stack(best)
    return Read(nats / best_BT.numel(), best_BT)


@torch.inference_mode()
def step_loss(model: LanguageModel, ids_BT: Tensor, read: Read, decoder: Decoder | None, kv: str = "float") -> StepLoss:
    """Measure the loss of the same tokens, written; `kv`: how keys and values are held."""
    T = ids_BT.shape[1]
    session = Session(model, ids_BT[:, :1].tolist(), T, decoder=decoder, kv=kv)
    logits_BV, nats, n_same = session.begin(), 0.0, 0
    for place in range(1, T):
        labels_B = ids_BT[:, place]
        nats += float(F.cross_entropy(logits_BV.float(), labels_B, reduction="sum"))
        n_same += int((logits_BV.argmax(dim=1) == read.best_BT[:, place - 1]).sum())
        if place < T - 1:
            logits_BV = session.step(labels_B)
    n_tokens = read.best_BT.numel()
    return StepLoss(read.loss, nats / n_tokens, n_same / n_tokens, n_tokens)
