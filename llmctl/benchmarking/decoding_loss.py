"""Quality loss of decoding: the loss of a text decoded token by token, compared with a float32 forward pass.

The decoding step may round more than the model file does: the compiled step quantizes the inputs of quantized weights to 8
bits in blocks, torch may compute in bfloat16, and `--kv int8` quantizes keys and values. The reference is a forward pass
with dequantized float32 weights; then the same tokens are fed to the decoding step (teacher forcing).
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
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

N_ROWS, ROW_TOKENS = 4, 256
"""Rows, and tokens per row."""
TOKEN_CHARACTERS = 16
"""An upper bound for the mean characters per token, so that only the beginning of a long text is encoded."""


@dataclass(frozen=True)
class Read:
    """Reference forward pass over ids (B, T): nats per token, and the top predictions (B, T-1)."""

    loss: float
    best_BT: Tensor


@dataclass(frozen=True)
class StepLoss:
    """Nats per token of the reference (read) and of decoding (written), and their top-1 agreement."""

    read: float
    written: float
    same_best_frac: float
    n_tokens: int

    @property
    def perplexity_change(self) -> float:
        """Relative increase of the perplexity by decoding."""
        return math.expm1(self.written - self.read)


def rows_of(loaded: Loaded, path: str) -> Tensor:
    """Return the beginning of a text as rows of equal length (B, T), each with the model's begin token.

    Raises: UsageError for a model that is not a decoder, or a text that is too short.
    """
    tokenizer, config = require_tokenizer(loaded), loaded.model.config
    if config.family != "decoder":
        raise UsageError(f"`{loaded.artifact.path}` is not a decoder, which `--data` needs", "omit `--data`")
    # Models that saw a begin token before every text are far off without one.
    head = list(loaded.frame.before)
    room, ids = min(ROW_TOKENS, config.max_positions) - len(head), list[int]()
    for text in read_documents([path]):
        ids += tokenizer.encode(text[: N_ROWS * ROW_TOKENS * TOKEN_CHARACTERS])
        # Encode no more than needed: the text may be a whole corpus.
        if len(ids) >= N_ROWS * room:
            break
    room = min(room, len(ids) // N_ROWS)
    if room < 2:
        raise UsageError(f"`{path}` has {len(ids)} tokens, too few to measure a loss", "use a longer text")
    return torch.tensor([[*head, *ids[start : start + room]] for start in range(0, N_ROWS * room, room)])


@torch.inference_mode()
def read_rows(model: LanguageModel, ids_BT: Tensor) -> Read:
    """Measure the reference loss of all tokens but the first of each row, row by row."""
    # One row at a time: logits of all rows together would need B * T * V floats.
    nats, best = 0.0, []
    for ids_1T in ids_BT.split(1):
        logits_TV = model(ids_1T)[0, :-1].float()
        nats += float(F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum"))
        best.append(logits_TV.argmax(dim=1))
    best_BT = torch.stack(best)
    return Read(nats / best_BT.numel(), best_BT)


@torch.inference_mode()
def step_loss(model: LanguageModel, ids_BT: Tensor, read: Read, decoder: Decoder | None, kv: str = "float") -> StepLoss:
    """Measure the loss of the same tokens in the decoding step; `kv`: kind of cache."""
    T = ids_BT.shape[1]
    session = Session(model, ids_BT[:, :1].tolist(), T, decoder=decoder, kv=kv)
    logits_BV, nats, n_same = session.begin(), 0.0, 0
    for position in range(1, T):
        labels_B = ids_BT[:, position]
        nats += float(F.cross_entropy(logits_BV.float(), labels_B, reduction="sum"))
        n_same += int((logits_BV.argmax(dim=1) == read.best_BT[:, position - 1]).sum())
        # The last token is only a label.
        if position < T - 1:
            logits_BV = session.step(labels_B)
    n_tokens = read.best_BT.numel()
    return StepLoss(read.loss, nats / n_tokens, n_same / n_tokens, n_tokens)
