"""What is hidden from the model: BERT's masked tokens and T5's removed spans, as functions of arrays and a generator.

Knows nothing of files, streams or models. Everything drawn comes from the generator passed in.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Masking:
    """How tokens are masked: the share, the mask's id, and what must not be touched or may stand in.

    Shapes: special (V,) True where a token is a special one; word_starts (V,) or None for token-wise masking.
    """

    mask_id: int
    frac: float
    special: Bools
    word_starts: Bools | None = None


def mask_tokens(tokens_T: Ints, rng: np.random.Generator, masking: Masking) -> tuple[Ints, Ints]:
    """Hide a share of the tokens and return (inputs, labels); labels are IGNORE where nothing was hidden.

    Of the chosen tokens 80 % become the mask, 10 % a random ordinary token, 10 % stay, and all are predicted.
    Exactly the asked share is chosen (at least one token), and with `word_starts` whole words are chosen together.
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
    draw = rng.random(len(chosen))
    inputs_T[chosen[draw < 0.8]] = masking.mask_id
    swapped = chosen[(draw >= 0.8) & (draw < 0.9)]
    ordinary = np.flatnonzero(~masking.special)
    inputs_T[swapped] = ordinary[rng.integers(len(ordinary), size=len(swapped))]
    return inputs_T, labels_T


def choose_words(tokens_T: Ints, candidates: Ints, n_chosen: int, rng: np.random.Generator, word_starts: Bools) -> Ints:
    """Choose whole words at random until about `n_chosen` tokens are reached; a word that overshoots is skipped."""
    breaks = word_starts[tokens_T[candidates]]
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
    """Cut spans out of a text and return (what is left, what was cut), sentinels marking the cuts in both.

    Raises nothing for short texts: one token is cut out of two or more, and a single token is cut whole.
    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4 and figure 2 (without the closing sentinel; the
    caller ends both sides with its end-of-text token).
    """
    n_tokens = len(tokens_T)
    n_noise = min(max(round(n_tokens * frac), 1), max(n_tokens - 1, 1))
    n_spans = max(1, min(round(n_noise / mean_span_tokens), n_noise, n_tokens - n_noise or 1, len(sentinels)))
    noise = random_lengths(n_noise, n_spans, rng)
    kept = random_lengths(n_tokens - n_noise, n_spans, rng)
    source: list[Ints] = []
    target: list[Ints] = []
    at = 0
    for sentinel, n_kept, n_cut in zip(sentinels, kept, noise, strict=False):
        mark = np.array([sentinel], dtype=np.int64)
        source += [tokens_T[at : at + n_kept], mark]
        target += [mark, tokens_T[at + n_kept : at + n_kept + n_cut]]
        at += n_kept + n_cut
    return np.concatenate(source), np.concatenate(target)


def random_lengths(total: int, n_parts: int, rng: np.random.Generator) -> Ints:
    """Split `total` into `n_parts` positive lengths, every split equally likely (zeros only if total < n_parts)."""
    if total < n_parts:
        return np.bincount(np.arange(total), minlength=n_parts).astype(np.int64)
    cuts = np.sort(rng.choice(total - 1, n_parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)
