"""Find named entities with a head over tokens: spans of a text with a label and a score.

As `pipeline("ner", aggregation_strategy="simple")` of transformers: neighboring tokens of one label are an entity, a
label that begins with `B-` begins one, and its score is the mean of its tokens'.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded
from llmctl.inference.encoding import longest_row
from llmctl.inference.rows import token_outputs
from llmctl.inference.sampling import require_finite
from llmctl.inference.windows import windows
from llmctl.tokenizer.base import Span

OUTSIDE = "O"
"""The label of tokens that are part of no entity."""


@dataclass(frozen=True)
class Entity:
    """A part of a text, by the characters from `start` to before `end`."""

    label: str
    text: str
    start: int
    end: int
    score: float


def names_of(loaded: Loaded) -> tuple[str, ...]:
    """Return the labels of a head's outputs: their numbers, if it has no names."""
    config = loaded.model.config
    return config.labels or tuple(str(number) for number in range(config.n_labels))


def find_entities(loaded: Loaded, texts: Sequence[str], *, batch_size: int = 32) -> list[list[Entity]]:
    """Return the entities of texts; a long text is read in windows that overlap."""
    names, found = names_of(loaded), [list[list[Entity]]() for _ in texts]
    rows, _ = windows(loaded, texts, longest_row(loaded))
    for window, outputs_TL in zip(rows, token_outputs(loaded, [each.row for each in rows], batch_size), strict=True):
        inside_TL = outputs_TL[window.first : window.first + len(window.spans)]
        found[window.text].append(grouped(texts[window.text], window.spans, inside_TL, names))
    return [
        # Some tokens have the space before their word, and may stand for nothing else.
        [stripped for entity in merged(parts) if (stripped := without_spaces(entity)).text]
        for parts in found
    ]


def label_words(loaded: Loaded, rows: Sequence[Sequence[str]], limit: int, batch_size: int) -> list[list[str]]:
    """Return the label of every word: that of its first token, in the first window that has it.

    A word without a token, of characters that the tokenizer drops, is outside of entities.
    """
    names = names_of(loaded)
    labels = [[OUTSIDE] * len(words) for words in rows]
    word_at = [
        # The words are joined by spaces: the number of the word at each character, spaces with the word after them.
        [number for number, word in enumerate(words) for _ in range(len(word) + (number > 0))]
        for words in rows
    ]
    seen: list[set[int]] = [set() for _ in rows]
    parts, _ = windows(loaded, [" ".join(words) for words in rows], limit)
    for window, outputs_TL in zip(parts, token_outputs(loaded, [each.row for each in parts], batch_size), strict=True):
        found = outputs_TL[window.first : window.first + len(window.spans)].argmax(dim=1).tolist()
        for (begin, end), label in zip(window.spans, found, strict=True):
            if end > begin:
                word = word_at[window.text][end - 1]
                if word not in seen[window.text]:
                    seen[window.text].add(word)
                    labels[window.text][word] = names[label]
    return labels


def without_spaces(entity: Entity) -> Entity:
    """Return an entity without the white space around it."""
    start, end = trimmed(entity.text, 0, len(entity.text))
    return replace(entity, text=entity.text[start:end], start=entity.start + start, end=entity.start + end)


def grouped(text: str, spans: Sequence[Span], outputs_TL: Tensor, names: Sequence[str]) -> list[Entity]:
    """Return the entities of a window, from the outputs at its tokens."""
    if not spans:
        return []
    require_finite(outputs_TL.amax(dim=1))
    scores, labels = outputs_TL.softmax(dim=1).max(dim=1)
    groups: list[list[int]] = []
    last = ""
    for token, label in enumerate(labels.tolist()):
        begins, kind = names[label].startswith("B-"), kind_of(names[label])
        if groups and kind == last and not begins:
            groups[-1].append(token)
        else:
            groups.append([token])
        last = kind
    entities = []
    for group in groups:
        label = names[int(labels[group[0]])]
        if label != OUTSIDE:
            start, end = spans[group[0]][0], spans[group[-1]][1]
            score = float(torch.stack([scores[token] for token in group]).mean())
            entities.append(Entity(kind_of(label), text[start:end], start, end, score))
    return entities


def kind_of(label: str) -> str:
    """Return what a label says besides whether it begins an entity."""
    return label[2:] if label.startswith(("B-", "I-")) else label


def trimmed(text: str, start: int, end: int) -> Span:
    """Return a span without the white space at its ends, which some tokens have."""
    inner = text[start:end]
    start += len(inner) - len(inner.lstrip())
    return start, max(start, start + len(inner.strip()))


def merged(parts: Sequence[list[Entity]]) -> list[Entity]:
    """Return the entities of all windows; of those that overlap, the longest and then the most likely stays."""
    if len(parts) < 2:
        return [entity for part in parts for entity in part]
    kept: list[Entity] = []
    for entity in sorted((entity for part in parts for entity in part), key=lambda each: each.start):
        if kept and entity.start < kept[-1].end:
            kept[-1] = max(kept[-1], entity, key=lambda each: (each.end - each.start, each.score))
        else:
            kept.append(entity)
    return kept
