"""Fill the masks of a text with an encoder: the likeliest tokens for every mask, seen with all the others masked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmctl.engine.models import Loaded
from llmctl.errors import UsageError
from llmctl.tokenizer.base import Tokenizer

MASK_WORDS = ("<mask>", "[MASK]")


@dataclass(frozen=True)
class Filled:
    """One text filled in: per mask the best (token text, probability), and the text with the best ones put in."""

    text: str
    filled: str
    masks: list[list[tuple[str, float]]]


def encode_around(tokenizer: Tokenizer, text: str, specials: Mapping[str, int]) -> list[int]:
    """Return a text's ids with the given words as their special tokens; all else is literal.

    A space before such a word belongs to what it stands for, where words carry their space.
    """
    if not specials:
        return tokenizer.encode(text)
    ids: list[int] = []
    carry = words_carry_spaces(tokenizer)
    words = sorted(specials, key=len, reverse=True)  # `<extra_id_10>` before `<extra_id_1>`
    for part in re.split(f"({'|'.join(re.escape(word) for word in words)})", text):
        if part in specials:
            ids.append(specials[part])
        else:
            ids += tokenizer.encode(part)
    return ids


def words_carry_spaces(tokenizer: Tokenizer) -> bool:
    """Tell whether there are tokens such as ` word`; characters and Chinese have none."""
    return any(len(data) > 1 and data[:1] == b" " and data.strip() for data in map(tokenizer.piece_bytes, range(tokenizer.vocab_size)))


def split_at_masks(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the parts of a text between its masks; `<mask>`, `[MASK]` and the tokenizer's own spelling all count.

    Raises: UsageError if there is none.
    """
    own = tokenizer.piece(tokenizer.mask_id) if tokenizer.mask_id is not None else ""
    parts = re.split("|".join(re.escape(word) for word in {*MASK_WORDS, own} - {""}), text)
    if len(parts) < 2:
        raise UsageError(f"`{text[:80]}` has no mask to fill", 'write one: llmctl fill "a <mask> of strings"')
    return parts


def encode_masked(loaded: Loaded, text: str) -> tuple[list[int], list[int]]:
    """Return a text's ids and the places of its masks.

    A space before a mask belongs to the word that is missing where words carry their space.
    Raises: UsageError for a model without tokenizer or mask, or a text longer than the context.
    """
    tokenizer, limit = loaded.tokenizer, loaded.model.config.max_positions
    if tokenizer is None or tokenizer.mask_id is None:
        raise UsageError(
            f"`{loaded.artifact.path}` has no mask token", "llmctl pretrain --objective mlm makes a model that has"
        )
    parts = split_at_masks(tokenizer, text)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    places = []
    for number, part in enumerate(parts):
        if number:
            places.append(len(ids))
            ids.append(tokenizer.mask_id)
        is_last = number == len(parts) - 1
        ids += tokenizer.encode(part if is_last else part.removesuffix(" "))
    ids += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if len(ids) > limit:
        raise UsageError(f"the text has {len(ids)} tokens, the model's context is {limit}", "shorten it")
    return ids, places


@torch.inference_mode()
def fill(loaded: Loaded, texts: Sequence[str], *, top_k: int = 5) -> list[Filled]:
    """Fill every text; together they are one batch, padding never changes a result.

    Raises: UsageError as `encode_masked`.
    """
    if top_k < 1:
        raise UsageError(f"--top-k is {top_k}, it must be at least 1")
    tokenizer = loaded.tokenizer
    encoded = [encode_masked(loaded, text) for text in texts]
    assert tokenizer is not None
    longest = max(len(ids) for ids, _ in encoded)
    ids_BT = torch.zeros(len(texts), longest, dtype=torch.long)
    documents_BT = torch.zeros_like(ids_BT)
    for row, (ids, _) in enumerate(encoded):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        documents_BT[row, : len(ids)] = 1
    model = loaded.model
    device = model.model.embed_tokens.weight.device
    is_padded = bool((documents_BT == 0).any())
    hidden = model.hidden(ids_BT.to(device), documents_BT=documents_BT.to(device) if is_padded else None)
    # What stands for no text (padding, begin and end, masks) is no answer.
    is_special = torch.from_numpy(tokenizer.token_bytes() == 0)
    results = []
    for row, (text, (_, places)) in enumerate(zip(texts, encoded, strict=True)):
        logits_MV = model.head(hidden[row, places]).float().cpu()
        logits_MV[:, len(is_special) :] = float("-inf")
        probabilities_MV = logits_MV.softmax(dim=1)
        probabilities_MV[:, : len(is_special)][:, is_special] = 0.0
        best = probabilities_MV.topk(min(top_k, len(is_special)), dim=1)
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
    parts = split_at_masks(tokenizer, text)
    out = parts[0]
    for word, part in zip(words, parts[1:], strict=True):
        out = out.removesuffix(" ") if word.startswith(" ") else out
        out += word + part
    return out
