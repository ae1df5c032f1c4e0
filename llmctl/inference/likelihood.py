"""How likely given tokens are: nats and hits per row, for decoders and encoder-decoders, batched by length."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded
from llmctl.inference.rows import by_length, device_of, padded
from llmctl.model.transformer import LanguageModel
from llmctl.tokenizer.base import Tokenizer

CHUNK_TOKENS = 512
"""Tokens whose logits exist at the same time."""


@dataclass(frozen=True)
class Known:
    """Tokens that are given, of which `ids[first:]` are counted; of a decoder the first token has no predecessor.

    source: what the encoder of an encoder-decoder reads; `ids` are then its target.
    """

    ids: list[int]
    first: int = 0
    source: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Likelihood:
    """Of the counted tokens of a row: nats, how many were the likeliest ones, and how many there are."""

    nats: float
    n_correct: int
    count: int


def likelihoods(loaded: Loaded, rows: Sequence[Known], batch_size: int) -> list[Likelihood]:
    """Return the likelihood of every row, in order; a row's does not depend on the others beyond rounding."""
    found = {number: Likelihood(0.0, 0, 0) for number, row in enumerate(rows) if row.first >= len(row.ids)}
    counted = [number for number in range(len(rows)) if number not in found]
    lengths = [max(len(rows[number].ids), len(rows[number].source)) for number in counted]
    with torch.inference_mode():
        for places_in_counted in by_length(lengths, batch_size):
            numbers = [counted[place] for place in places_in_counted]
            batch = [rows[number] for number in numbers]
            is_decoder = loaded.model.config.family == "decoder"
            hidden_BTD = _decoder(loaded, batch) if is_decoder else _encoder_decoder(loaded, batch)
            # The state before a token predicts it; a target's states are those of its input, which begins one earlier.
            places = [range(row.first - is_decoder, len(row.ids) - is_decoder) for row in batch]
            states_ND = torch.cat([hidden_BTD[n, list(part)] for n, part in enumerate(places)])
            labels = [index for row in batch for index in row.ids[row.first :]]
            nats_N, right_N = token_losses(loaded.model, states_ND, torch.tensor(labels, device=states_ND.device))
            at = 0
            for number, part in zip(numbers, places, strict=True):
                span = slice(at, at + len(part))
                found[number] = Likelihood(float(nats_N[span].sum()), int(right_N[span].sum()), len(part))
                at += len(part)
    return [found[number] for number in range(len(rows))]


def _decoder(loaded: Loaded, rows: Sequence[Known]) -> Tensor:
    ids_BT, documents_BT = padded([row.ids[:-1] for row in rows], device_of(loaded))  # the last is only a label
    return loaded.model.hidden(ids_BT, documents_BT=documents_BT)


def _encoder_decoder(loaded: Loaded, rows: Sequence[Known]) -> Tensor:
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
    """Return the nats of every label (float64) and whether it is the likeliest, on the CPU; logits a chunk at a time."""
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
    """Return the ids of a context and of what follows it, which begins with a space where there is one.

    Both are encoded together and cut where the context ends. Where no token ends there, they are encoded apart, so
    that the context is the same whatever follows it; a space that the tokenizer itself puts before a text then
    stands for the one between the two.
    """
    before, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if both[: len(before)] == before and len(both) > len(before):
        return before, both[len(before) :]
    probe = tokenizer.encode("a")
    adds_space = bool(probe) and tokenizer.decode_bytes(probe[:1]).startswith(b" ")
    return before, tokenizer.encode(continuation.removeprefix(" ") if adds_space else continuation)
