"""Input corruption: BERT's masked tokens and T5's span corruption, as functions of arrays and a random generator.

Knows no files, streams or models. All randomness comes from the generator passed in.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Masking:
    """How tokens are masked: the fraction, the mask token's id, and which tokens are special.

    Shapes: special (V,), True for special tokens, which are neither masked nor used as random replacements;
    word_starts (V,), True for tokens that start a word, or None for token-wise masking.
    """

    mask_id: int
    frac: float
    special: Bools
    word_starts: Bools | None = None


def mask_tokens(tokens_T: Ints, rng: np.random.Generator, masking: Masking) -> tuple[Ints, Ints]:
    """Mask a fraction of the tokens and return (inputs, labels); labels are IGNORE at all other positions.

    Of the chosen tokens, 80 % become the mask token, 10 % a random non-special token, 10 % stay; all are predicted.
    Exactly the requested fraction is chosen (at least one token); with `word_starts`, whole words are chosen.
    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1; whole words: the authors' note of May 2019.
    """
    candidates = np.flatnonzero(~masking.special[tokens_T])
    labels_T = np.full_like(tokens_T, IGNORE)
    if len(candidates) == 0:
        return tokens_T.copy(), labels_T
    n_chosen = max(1, round(masking.frac * len(candidates)))
    if masking.word_starts is None:
        chosen = rng.choice(candidates, n_chosen, replace=False)
    else:
        chosen = choose_words(tokens_T, candidates, n_chosen, rng, masking.word_starts)
    inputs_T = tokens_T.copy()
    labels_T[chosen] = tokens_T[chosen]
    uniform = rng.random(len(chosen))
    inputs_T[chosen[uniform < 0.8]] = masking.mask_id
    replaced = chosen[(uniform >= 0.8) & (uniform < 0.9)]
    ordinary = np.flatnonzero(~masking.special)
    inputs_T[replaced] = ordinary[rng.integers(len(ordinary), size=len(replaced))]
    return inputs_T, labels_T


def choose_words(tokens_T: Ints, candidates: Ints, n_chosen: int, rng: np.random.Generator, word_starts: Bools) -> Ints:
    """Choose random whole words up to `n_chosen` tokens in total; a word that would exceed that is skipped."""
    breaks = word_starts[tokens_T[candidates]]
    # A special token between two candidates also ends a word; the -2 makes the first candidate a break.
    breaks |= np.diff(candidates, prepend=candidates[0] - 2) != 1
    words = np.split(candidates, np.flatnonzero(breaks)[1:] if breaks[0] else np.flatnonzero(breaks))
    chosen: list[Ints] = []
    room = n_chosen
    for index in rng.permutation(len(words)):
        if 0 < len(words[index]) <= room:
            chosen.append(words[index])
            room -= len(words[index])
        if room == 0:
            break
    return np.concatenate(chosen) if chosen else words[int(rng.integers(len(words)))]


def remove_spans(
    tokens_T: Ints, rng: np.random.Generator, *, sentinels: Ints, frac: float, mean_span_tokens: float
) -> tuple[Ints, Ints]:
    """Remove random spans and return (remaining text, removed spans), with a sentinel in place of each span.

    Short texts are fine: at least one token is removed, and all but one token at most; a single token is removed.
    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4 and figure 2 (without the final sentinel: the caller
    appends its end-of-text token to both sides).
    """
    n_tokens = len(tokens_T)
    n_noise = min(max(round(n_tokens * frac), 1), max(n_tokens - 1, 1))
    # Every span needs a removed token, a kept token before it, and a sentinel of its own.
    n_spans = max(1, min(round(n_noise / mean_span_tokens), n_noise, n_tokens - n_noise or 1, len(sentinels)))
    noise = random_lengths(n_noise, n_spans, rng)
    kept = random_lengths(n_tokens - n_noise, n_spans, rng)
    source: list[Ints] = []
    target: list[Ints] = []
    at = 0
    for sentinel, n_kept, n_removed in zip(sentinels, kept, noise, strict=False):
        marker = np.array([sentinel], dtype=np.int64)
        source += [tokens_T[at : at + n_kept], marker]
        target += [marker, tokens_T[at + n_kept : at + n_kept + n_removed]]
        at += n_kept + n_removed
    return np.concatenate(source), np.concatenate(target)


def random_lengths(total: int, n_parts: int, rng: np.random.Generator) -> Ints:
    """Split `total` into `n_parts` positive lengths, uniformly at random (zeros only if total < n_parts)."""
    if total < n_parts:
        return np.bincount(np.arange(total), minlength=n_parts).astype(np.int64)
    cuts = np.sort(rng.choice(total - 1, n_parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)
