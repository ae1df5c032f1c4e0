"""Predict masked tokens with an encoder: the most likely tokens for each mask, all other masks still in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmctl.artifacts.load import Loaded
from llmctl.errors import UsageError
from llmctl.inference.encoding import carries_spaces, encode_around, split_at
from llmctl.inference.sampling import require_finite
from llmctl.tokenizer.base import Tokenizer

MASK_WORDS = ("<mask>", "[MASK]")


@dataclass(frozen=True)
class Filled:
    """One filled text: per mask the top (token text, probability) pairs, and the text with the top tokens inserted."""

    text: str
    filled: str
    masks: list[list[tuple[str, float]]]


def mask_words(tokenizer: Tokenizer) -> set[str]:
    """Return the accepted spellings of a mask: `<mask>`, `[MASK]`, and the tokenizer's own."""
    own = tokenizer.piece(tokenizer.mask_id) if tokenizer.mask_id is not None else ""
    return {*MASK_WORDS, own} - {""}


def encode_masked(loaded: Loaded, text: str, number: int = 1) -> tuple[list[int], list[int]]:
    """Encode a text and return its ids and mask positions; `number` identifies it in errors.

    Raises: UsageError for a model without tokenizer or mask, a text without a mask, or one longer than the context.
    """
    tokenizer, limit = loaded.tokenizer, loaded.model.config.max_positions
    if tokenizer is None or tokenizer.mask_id is None:
        raise UsageError(
            f"`{loaded.artifact.path}` has no mask token", "`llmctl pretrain --objective mlm` trains a model with one"
        )
    before, _, after = loaded.frame
    ids = [*before, *encode_around(tokenizer, text, dict.fromkeys(mask_words(tokenizer), tokenizer.mask_id)), *after]
    # Every mask id is one of our masks: tokenizers never encode text as a mask.
    positions = [position for position, index in enumerate(ids) if index == tokenizer.mask_id]
    if not positions:
        raise UsageError(
            f"text {number}, `{text[:80]}`, has no mask to fill", 'add one: `llmctl fill "a <mask> of strings"`'
        )
    if len(ids) > limit:
        raise UsageError(f"text {number} has {len(ids)} tokens, the model's context is {limit}", "shorten the text")
    return ids, positions


@torch.inference_mode()
def fill(loaded: Loaded, texts: Sequence[str], *, top_k: int = 5, first: int = 1) -> list[Filled]:
    """Fill texts as one batch; padding does not change a result. `first` is the number of the first text in errors.

    Raises: UsageError as `encode_masked`.
    """
    if top_k < 1:
        raise UsageError(f"`--top-k` is {top_k}, it must be at least 1", "use `--top-k 5`")
    tokenizer = loaded.tokenizer
    encoded = [encode_masked(loaded, text, number) for number, text in enumerate(texts, first)]
    assert tokenizer is not None
    longest = max(len(ids) for ids, _ in encoded)
    ids_BT = torch.zeros(len(texts), longest, dtype=torch.long)
    documents_BT = torch.zeros_like(ids_BT)
    for row, (ids, _) in enumerate(encoded):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        documents_BT[row, : len(ids)] = 1
    model = loaded.model
    device = model.device
    is_padded = bool((documents_BT == 0).any())
    hidden = model.hidden(ids_BT.to(device), documents_BT=documents_BT.to(device) if is_padded else None)
    # Tokens without text (padding, begin, end, mask) are not candidates.
    is_text = torch.from_numpy(tokenizer.token_bytes() > 0)
    results = []
    for row, (text, (_, positions)) in enumerate(zip(texts, encoded, strict=True)):
        # Ids beyond the tokenizer's vocabulary are padding of the embedding table.
        logits_MV = model.head(hidden[row, positions]).float().cpu()[:, : len(is_text)]
        require_finite(logits_MV.amax(dim=1))
        probabilities_MV = logits_MV.softmax(dim=1).masked_fill(~is_text, -1.0)
        best = probabilities_MV.topk(min(top_k, int(is_text.sum())), dim=1)
        masks = [
            [
                (tokenizer.decode_bytes([int(i)]).decode("utf-8", "replace"), float(p))
                for p, i in zip(ps, ids, strict=True)
            ]
            for ps, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        results.append(Filled(text, put_in(tokenizer, text, [mask[0][0] for mask in masks]), masks))
    return results


def put_in(tokenizer: Tokenizer, text: str, words: Sequence[str]) -> str:
    """Return the text with masks replaced; a token with a leading space replaces the space before its mask."""
    parts = split_at(mask_words(tokenizer), text)
    carried = carries_spaces(tokenizer)
    out = parts[0]
    for word, part in zip(words, parts[2::2], strict=True):
        out = out.removesuffix(" ") if carried and word.startswith(" ") else out
        out += word + part
    return out
