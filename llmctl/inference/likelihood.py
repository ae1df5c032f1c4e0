"""Log-likelihood of given tokens: nats and top-1 hits per row, for decoders and encoder-decoders."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded
from llmctl.inference.rows import by_length, device_of, padded
from llmctl.model.transformer import LanguageModel
from llmctl.tokenizer.base import Tokenizer

CHUNK_TOKENS = 512
"""Tokens per chunk of logits: bounds the memory."""


@dataclass(frozen=True)
class ScoredRow:
    """A row of token ids, of which `ids[first:]` are scored; a decoder cannot score its first token.

    source: the input of the encoder (encoder-decoder); `ids` are then the target.
    """

    ids: list[int]
    first: int = 0
    source: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Likelihood:
    """Score of a row: nats, number of tokens that were the top prediction, and number of scored tokens."""

    nats: float
    n_correct: int
    count: int


def likelihoods(loaded: Loaded, rows: Sequence[ScoredRow], batch_size: int) -> list[Likelihood]:
    """Return the likelihood of every row, in order; it does not depend on the other rows, except for rounding."""
    results = {number: Likelihood(0.0, 0, 0) for number, row in enumerate(rows) if row.first >= len(row.ids)}
    scored = [number for number in range(len(rows)) if number not in results]
    lengths = [max(len(rows[number].ids), len(rows[number].source)) for number in scored]
    with torch.inference_mode():
        for indices in by_length(lengths, batch_size):
            numbers = [scored[index] for index in indices]
            batch = [rows[number] for number in numbers]
            is_decoder = loaded.model.config.family == "decoder"
            hidden_BTD = _decoder(loaded, batch) if is_decoder else _encoder_decoder(loaded, batch)
            # The state at t predicts token t + 1. In a decoder that is a shift by one; the input of an encoder-decoder
            # already starts one earlier, with the start token.
            spans = [range(row.first - is_decoder, len(row.ids) - is_decoder) for row in batch]
            states_ND = torch.cat([hidden_BTD[n, list(part)] for n, part in enumerate(spans)])
            labels = [index for row in batch for index in row.ids[row.first :]]
            nats_N, right_N = token_losses(loaded.model, states_ND, torch.tensor(labels, device=states_ND.device))
            at = 0
            for number, part in zip(numbers, spans, strict=True):
                span = slice(at, at + len(part))
                results[number] = Likelihood(float(nats_N[span].sum()), int(right_N[span].sum()), len(part))
                at += len(part)
    return [results[number] for number in range(len(rows))]


def _decoder(loaded: Loaded, rows: Sequence[ScoredRow]) -> Tensor:
    ids_BT, documents_BT = padded([row.ids[:-1] for row in rows], device_of(loaded))  # the last token is only a label
    return loaded.model.hidden(ids_BT, documents_BT=documents_BT)


def _encoder_decoder(loaded: Loaded, rows: Sequence[ScoredRow]) -> Tensor:
    device = device_of(loaded)
    start = max(loaded.model.config.decoder_start_id, 0)
    source_BS, source_documents_BS = padded([row.source for row in rows], device)
    input_BT, input_documents_BT = padded([[start, *row.ids[:-1]] for row in rows], device)
    return loaded.model.hidden(
        source_BS,
        documents_BT=source_documents_BS,
        decoder_input_ids_BT=input_BT,
        decoder_documents_BT=input_documents_BT,
    )


def token_losses(model: LanguageModel, states_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nats (float64) of every label and whether it is the top prediction, on the CPU, chunk by chunk."""
    nats, right = [], []
    for start in range(0, len(labels_N), CHUNK_TOKENS):
        labels_C = labels_N[start : start + CHUNK_TOKENS, None]
        logits_CV = model.head(states_ND[start : start + CHUNK_TOKENS]).float()
        picked_C1 = logits_CV.gather(1, labels_C)
        nats.append((logits_CV.logsumexp(dim=1, keepdim=True) - picked_C1).squeeze(1).double().cpu())
        right.append((picked_C1 >= logits_CV.amax(dim=1, keepdim=True)).squeeze(1).cpu())
    if not nats:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    return torch.cat(nats), torch.cat(right)


def split_ids(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of its continuation, which includes a leading space if there is one.

    Both are encoded together and split at the end of the context. If a token spans that boundary, they are encoded
    separately, so that the context has the same ids for every continuation; if the tokenizer prepends a space to a
    text, that space then replaces the leading one.
    """
    before, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if both[: len(before)] == before and len(both) > len(before):
        return before, both[len(before) :]
    probe = tokenizer.encode("a")
    adds_space = bool(probe) and tokenizer.decode_bytes(probe[:1]).startswith(b" ")
    return before, tokenizer.encode(continuation.removeprefix(" ") if adds_space else continuation)
