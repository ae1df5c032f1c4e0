"""Fill the masks of a text with an encoder: the likeliest tokens for every mask, seen with all the others masked."""

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
    """One text filled in: per mask the best (token text, probability), and the text with the best ones put in."""

    text: str
    filled: str
    masks: list[list[tuple[str, float]]]


def mask_words(tokenizer: Tokenizer) -> set[str]:
    """Return the spellings of a mask: `<mask>`, `[MASK]`, and the tokenizer's own."""
    own = tokenizer.piece(tokenizer.mask_id) if tokenizer.mask_id is not None else ""
    return {*MASK_WORDS, own} - {""}


def encode_masked(loaded: Loaded, text: str, number: int = 1) -> tuple[list[int], list[int]]:
    """Return a text's ids and the places of its masks; errors call it by its number.

    Raises: UsageError for a model without tokenizer or mask, a text without a mask, or one longer than the context.
    """
    tokenizer, limit = loaded.tokenizer, loaded.model.config.max_positions
    if tokenizer is None or tokenizer.mask_id is None:
        raise UsageError(
            f"`{loaded.artifact.path}` has no mask token", "llmctl pretrain --objective mlm makes a model that has"
        )
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += encode_around(tokenizer, text, dict.fromkeys(mask_words(tokenizer), tokenizer.mask_id))
    ids += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    # Only a mask is encoded as one: tokenizers take text literally.
    places = [place for place, index in enumerate(ids) if index == tokenizer.mask_id]
    if not places:
        raise UsageError(
            f"text {number}, `{text[:80]}`, has no mask to fill", 'write one: llmctl fill "a <mask> of strings"'
        )
    if len(ids) > limit:
        raise UsageError(f"text {number} has {len(ids)} tokens, the model's context is {limit}", "shorten it")
    return ids, places


@torch.inference_mode()
def fill(loaded: Loaded, texts: Sequence[str], *, top_k: int = 5, first: int = 1) -> list[Filled]:
    """Fill every text; together they are one batch, padding never changes a result. `first` numbers them in errors.

    Raises: UsageError as `encode_masked`.
    """
    if top_k < 1:
        raise UsageError(f"--top-k is {top_k}, it must be at least 1")
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
    # What stands for no text (padding, begin and end, masks) is no answer.
    is_text = torch.from_numpy(tokenizer.token_bytes() > 0)
    results = []
    for row, (text, (_, places)) in enumerate(zip(texts, encoded, strict=True)):
        # Ids beyond the tokenizer's only pad the vocabulary.
        logits_MV = model.head(hidden[row, places]).float().cpu()[:, : len(is_text)]
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
    """Return the text with the masks replaced; a word brings its own space or takes the one before the mask."""
    parts = split_at(mask_words(tokenizer), text)
    carried = carries_spaces(tokenizer)
    out = parts[0]
    for word, part in zip(words, parts[2::2], strict=True):
        out = out.removesuffix(" ") if carried and word.startswith(" ") else out
        out += word + part
    return out
