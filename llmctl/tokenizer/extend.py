"""Larger vocabularies: byte pairs learned on top of those of a tokenizer, for another language or domain.

The new merges come after all others, so they join what the tokenizer makes of a word and change nothing before that. Source of
the merges: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1, on the pieces of words instead of their characters.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.files import json_of
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.huggingface import HuggingFaceTokenizer, as_artifact_error, tokenizers_module
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.trim import JSON, OTHER_FORMS

MOST_BYTES = 32
"""The longest new piece."""

LEAST_COUNT = 2
"""How often two pieces must stand together to become one."""

Pair = tuple[str, str]


class Extended(NamedTuple):
    """A tokenizer, its files, and the earlier pieces that each of its new ones replaces, by id."""

    tokenizer: Tokenizer
    files: dict[str, bytes]
    parts: dict[int, list[int]]


def extend(tokenizer: Tokenizer, files: Mapping[str, bytes], texts: Iterable[str], n_pieces: int) -> Extended:
    """Return a tokenizer with up to `n_pieces` more pieces, learned on some texts; files: those of its model.

    Raises: UnsupportedModelError for other tokenizers than byte-level BPE in `tokenizer.json`; UsageError if the texts have no
    pair of pieces that stands together twice.
    """
    content = json_of(tokenizer.files(), JSON) if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    model: dict[str, Any] = content.get("model") or {}
    is_bytes = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
    if "merges" not in model or not is_bytes:
        raise UnsupportedModelError(
            "the vocabulary of this tokenizer cannot be extended",
            "supported: byte-level BPE in `tokenizer.json`, as of GPT-2, Llama 3, Qwen and SmolLM2",
        )
    words = words_of(content, texts)
    merges = learn(words, set(model["vocab"]), n_pieces)
    if not merges:
        raise UsageError("no two pieces of this text stand together twice", "pass more text of the language or domain")
    first = tokenizer.vocab_size
    vocabulary = dict(model["vocab"])
    parts: dict[int, list[int]] = {}
    for index, (left, right) in enumerate(merges, start=first):
        vocabulary[left + right] = index
        parts[index] = [one for side in (left, right) for one in parts.get(vocabulary[side], [vocabulary[side]])]
    # As they were: pairs, or the older form with a space between.
    is_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    written = [" ".join(pair) if is_text else list(pair) for pair in merges]
    new = {**content, "model": {**model, "vocab": vocabulary, "merges": [*model["merges"], *written]}}
    data = json.dumps(new, ensure_ascii=False, separators=(",", ":")).encode()
    result = {name: own for name, own in files.items() if name not in OTHER_FORMS} | {JSON: data}
    return Extended(tokenizer_from_files(result), result, parts)


def words_of(content: Mapping[str, Any], texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Return how often each word of some texts occurs, as the pieces of a `tokenizer.json`."""
    library = tokenizers_module().Tokenizer.from_str(json.dumps(content))
    normalizer, splitter = library.normalizer, library.pre_tokenizer
    words: Counter[str] = Counter()
    with as_artifact_error("`tokenizer.json` cannot split this text"):
        for text in texts:
            normal = text if normalizer is None else normalizer.normalize_str(text)
            words.update(word for word, _ in splitter.pre_tokenize_str(normal))
        found: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            found[tuple(token.value for token in library.model.tokenize(word))] += count
    return found


def learn(words: Mapping[tuple[str, ...], int], known: set[str], n_merges: int) -> list[Pair]:
    """Return the merges of neighbors, the most frequent pair first, that make new pieces; known: pieces that exist."""
    rows = [list(word) for word in words]
    counts = list(words.values())
    totals: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, row in enumerate(rows):
        for pair in pairwise(row):
            totals[pair] += counts[number]
            places[pair].add(number)
    heap = [(-total, pair) for pair, total in totals.items() if total >= LEAST_COUNT]
    heapq.heapify(heap)
    merges, taken = list[Pair](), set(known)
    while heap and len(merges) < n_merges:
        total, pair = heapq.heappop(heap)
        current = totals.get(pair, 0)
        joined = pair[0] + pair[1]
        if current < LEAST_COUNT or joined in taken or len(joined) > MOST_BYTES:
            continue
        if current != -total:  # it has been merged away in part
            heapq.heappush(heap, (-current, pair))
            continue
        merges.append(pair)
        taken.add(joined)
        changed: set[Pair] = set()
        for number in places.pop(pair):
            row, count = rows[number], counts[number]
            for old in pairwise(row):
                totals[old] -= count
            rows[number] = row = merged(row, pair, joined)
            for new in pairwise(row):
                totals[new] += count
                if number not in places[new]:
                    places[new].add(number)
                if joined in new:
                    changed.add(new)
        for new in changed:
            heapq.heappush(heap, (-totals[new], new))
    return merges


def merged(row: list[str], pair: Pair, joined: str) -> list[str]:
    """Return a row in which a pair of neighbors is joined, from the left."""
    found: list[str] = []
    at = 0
    while at < len(row):
        if at + 1 < len(row) and (row[at], row[at + 1]) == pair:
            found.append(joined)
            at += 2
        else:
            found.append(row[at])
            at += 1
    return found
