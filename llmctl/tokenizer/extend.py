"""Larger vocabularies: pieces learned on top of those of a tokenizer, for another language or domain.

Characters that the tokenizer has no piece for come first, then pairs of neighbors, the most frequent first. Of byte pairs the
new merges come after all others, so they join what the tokenizer makes of a word and change nothing before that; a unigram
model takes a new piece where it is more probable than those that it replaces, WordPiece where it is the longest. Source of the
merges: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1, on the pieces of words instead of their characters.
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.files import json_of
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.huggingface import HuggingFaceTokenizer, as_artifact_error, tokenizers_module
from llmctl.tokenizer.learn_pairs import LEAST_COUNT, Pair, learn_counted
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.protobuf import bytes_field, encoded
from llmctl.tokenizer.sentencepiece import BYTE, MODEL_FILE, SPACE, SentencePieceTokenizer
from llmctl.tokenizer.trim import JSON, OTHER_FORMS, Model

CHARACTERS_FRAC = 0.5
"""The most of the new pieces that are single characters, where pairs are learned as well."""

MARGIN = 0.1
"""How much more probable a unigram model finds a new piece than the two that it joins, in nats, at least."""

SCORE = 2
"""The field of a sentencepiece model's piece with its score."""


class Extended(NamedTuple):
    """A tokenizer, its files, and the earlier pieces that each of its new ones replaces, by id."""

    tokenizer: Tokenizer
    files: dict[str, bytes]
    parts: dict[int, list[int]]


class Piece(NamedTuple):
    """A new piece: its name, the two that it joins (none for a character), and how often it occurs in the texts."""

    name: str
    pair: Pair | None
    n_times: int


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's pieces and texts in them.

    ids: of the pieces by name. words: how often each sequence of names occurs; a character without a piece is a name as well.
    joined: the name of two neighbors. in_place_of: the ids that a character without a piece is encoded as. write: new pieces,
    and how many names the words have in all -> the files that change; None for one that is not kept.
    """

    ids: Mapping[str, int]
    words: Counter[tuple[str, ...]]
    joined: Callable[[str, str], str]
    in_place_of: Callable[[str], list[int]]
    write: Callable[[Sequence[Piece], int], dict[str, bytes | None]]


def extend(tokenizer: Tokenizer, files: Mapping[str, bytes], texts: Iterable[str], n_pieces: int) -> Extended:
    """Return a tokenizer with up to `n_pieces` more pieces, learned on some texts; files: those of its model.

    Raises: UnsupportedModelError for a kind of tokenizer that cannot be extended; UsageError if the texts have neither a pair
    of pieces nor a new character twice.
    """
    known = vocabulary_of(tokenizer, texts)
    pieces = new_pieces(known, n_pieces)
    if not pieces:
        raise UsageError("no two pieces of this text stand together twice", "pass more text of the language or domain")
    first = tokenizer.vocab_size
    parts: dict[int, list[int]] = {}
    places = dict(known.ids)
    for index, piece in enumerate(pieces, start=first):
        sides = [places[name] for name in piece.pair] if piece.pair else known.in_place_of(piece.name)
        parts[index] = [one for side in sides for one in parts.get(side, [side])]
        places[piece.name] = index
    written = known.write(pieces, sum(len(word) * count for word, count in known.words.items()))
    result = {name: data for name, data in {**files, **written}.items() if data is not None}
    return Extended(tokenizer_from_files(result), result, parts)


def new_pieces(known: Vocabulary, n_pieces: int) -> list[Piece]:
    """Return the pieces to add, in order: characters, then pairs of what is there by then."""
    counts: Counter[str] = Counter()
    for word, count in known.words.items():
        for name in word:
            if name not in known.ids:
                counts[name] += count
    most = math.ceil(n_pieces * CHARACTERS_FRAC)
    usual = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    characters = [Piece(name, None, count) for name, count in usual if count >= LEAST_COUNT]
    there = known.ids.keys() | {piece.name for piece in characters}
    words: Counter[tuple[str, ...]] = Counter()
    for word, count in known.words.items():
        for part in stretches(word, there):
            words[part] += count
    merges = learn_counted(words, there, n_pieces - len(characters), known.joined)
    return [*characters, *(Piece(known.joined(*pair), pair, count) for pair, count in merges)]


def stretches(word: Sequence[str], known: Container[str]) -> Iterator[tuple[str, ...]]:
    """Yield the parts of a word between names that are not known."""
    part: list[str] = []
    for name in word:
        if name in known:
            part.append(name)
        elif part:
            yield tuple(part)
            part = []
    if part:
        yield tuple(part)


def vocabulary_of(tokenizer: Tokenizer, texts: Iterable[str]) -> Vocabulary:
    """Return the pieces of a tokenizer, and texts in them.

    Raises: UnsupportedModelError.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return of_model(tokenizer, texts)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = json_of(tokenizer.files(), JSON)
        model: dict[str, Any] = content.get("model") or {}
        # New ids come after all others: those of a list are places, so nothing may have an id behind it.
        is_listed = isinstance(model.get("vocab"), list)
        has_form = "merges" in model or model.get("type") in ("WordPiece", "Unigram")
        if (
            has_form
            and not model.get("end_of_word_suffix")
            and (not is_listed or len(model["vocab"]) == tokenizer.vocab_size)
        ):
            return of_json(tokenizer, content, texts)
    raise UnsupportedModelError(
        "the vocabulary of this tokenizer cannot be extended",
        "supported: byte-level and metaspace BPE, Unigram and WordPiece in `tokenizer.json`, and `tokenizer.model`",
    )


# --- sentencepiece -----------------------------------------------------------------------------------------------------


def of_model(tokenizer: SentencePieceTokenizer, texts: Iterable[str]) -> Vocabulary:
    """Return the pieces of a `tokenizer.model`: byte pairs or unigram."""
    model = Model.read(tokenizer.files()[MODEL_FILE])
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for names in tokenizer.named_pieces([text], 1):
            words.update(map(tuple, words_in(with_characters(names, model.places))))
    return Vocabulary(
        {**model.places, **{name: index for index, name in enumerate(model.names) if BYTE.fullmatch(name)}},
        words,
        str.__add__,
        partial(bytes_or_unknown, {name: index for index, name in enumerate(model.names)}, tokenizer.unk_id),
        partial(written_model, model),
    )


def written_model(model: Model, pieces: Sequence[Piece], n_names: int) -> dict[str, bytes | None]:
    """Return a sentencepiece model with more pieces."""
    scores = {name: model.scores[index] for name, index in model.places.items()}
    new = []
    least = min(model.scores, default=0.0)
    for number, piece in enumerate(pieces, start=1):
        # Byte pairs are merged in the order of their scores.
        scores[piece.name] = least - number if model.is_bpe else probability(piece, scores, n_names)
        packed = struct.pack("<f", scores[piece.name])
        new.append(bytes_field(1, piece.name.encode()) + encoded(SCORE << 3 | 5) + packed)
    larger = model.with_pieces(new)
    return {**dict.fromkeys((JSON, *OTHER_FORMS)), MODEL_FILE: larger}


def probability(piece: Piece, scores: Mapping[str, float], n_names: int) -> float:
    """Return the score of a unigram model's new piece: its log probability in the texts.

    It is higher than that of the two pieces that it joins, or the model would never take it.
    """
    own = math.log(piece.n_times / max(1, n_names))
    return own if piece.pair is None else max(own, sum(scores[name] for name in piece.pair) + MARGIN)


def with_characters(names: Iterable[str], known: Container[str]) -> list[str]:
    """Return the names of pieces with the characters that bytes and unknown text stand for."""
    found: list[str] = []
    pending = b""
    for name in names:
        if BYTE.fullmatch(name):
            pending += bytes([int(name[3:5], 16)])
            continue
        found += pending.decode("utf-8", "ignore")
        pending = b""
        found += [name] if name in known else list(name)
    return [*found, *pending.decode("utf-8", "ignore")]


def words_in(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the words of a text in pieces: they begin with a space, and hold letters only or no letters."""
    word: list[str] = []
    for name in names:
        is_new = name.startswith(SPACE) or (word and is_letters(word[-1][-1]) != is_letters(name[0]))
        if word and is_new and word != [SPACE]:
            yield word
            word = []
        word.append(name)
    if word:
        yield word


def is_letters(character: str) -> bool:
    """Tell whether a character belongs to a word; a space does, which begins one."""
    return character.isalpha() or character == SPACE


def bytes_or_unknown(ids: Mapping[str, int], unknown: int | None, name: str) -> list[int]:
    """Return the ids of a character's bytes, or of unknown text."""
    found = [ids.get(f"<0x{byte:02X}>") for byte in name.encode()]
    known = [index for index in found if index is not None]
    if len(known) == len(found):
        return known
    return [] if unknown is None else [unknown]


# --- tokenizer.json ----------------------------------------------------------------------------------------------------


def of_json(tokenizer: Tokenizer, content: dict[str, Any], texts: Iterable[str]) -> Vocabulary:
    """Return the pieces of a `tokenizer.json`: byte-level or metaspace BPE, Unigram or WordPiece."""
    model = content["model"]
    listed = model["vocab"]
    ids = {name: index for index, (name, _) in enumerate(listed)} if isinstance(listed, list) else dict(listed)
    is_words = model.get("type") == "WordPiece"
    prefix = model.get("continuing_subword_prefix") or ("##" if is_words else "")

    def joined(left: str, right: str) -> str:
        return left + (right.removeprefix(prefix) if prefix else right)

    return Vocabulary(
        ids,
        words_of(content, texts, prefix),
        joined,
        partial(bytes_or_unknown, ids, tokenizer.unk_id),
        partial(written_json, content, tokenizer.vocab_size),
    )


def written_json(content: dict[str, Any], first: int, pieces: Sequence[Piece], n_names: int) -> dict[str, bytes | None]:
    """Return a `tokenizer.json` with more pieces, whose ids begin with `first`."""
    model = dict(content["model"])
    if isinstance(model["vocab"], list):
        scores = {name: float(score) for name, score in model["vocab"]}
        for piece in pieces:
            scores[piece.name] = probability(piece, scores, n_names)
        model["vocab"] = [*model["vocab"], *([piece.name, scores[piece.name]] for piece in pieces)]
    else:
        model["vocab"] = {**model["vocab"], **{piece.name: index for index, piece in enumerate(pieces, start=first)}}
    if "merges" in model:
        # As they were: pairs, or the older form with a space between.
        is_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
        pairs = [piece.pair for piece in pieces if piece.pair]
        model["merges"] = [*model["merges"], *(" ".join(pair) if is_text else list(pair) for pair in pairs)]
    data = json.dumps({**content, "model": model}, ensure_ascii=False, separators=(",", ":")).encode()
    return {**dict.fromkeys(OTHER_FORMS), JSON: data}


def words_of(content: Mapping[str, Any], texts: Iterable[str], prefix: str = "") -> Counter[tuple[str, ...]]:
    """Return how often each word of some texts occurs, as the pieces of a `tokenizer.json`."""
    library = tokenizers_module().Tokenizer.from_str(json.dumps(content))
    normalizer, splitter = library.normalizer, library.pre_tokenizer
    is_bytes = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
    is_words = content["model"].get("type") == "WordPiece"
    ids = content["model"]["vocab"]
    known = {name for name, _ in ids} if isinstance(ids, list) else ids.keys()
    words: Counter[str] = Counter()
    found: Counter[tuple[str, ...]] = Counter()
    with as_artifact_error("`tokenizer.json` cannot split this text"):
        for text in texts:
            normal = text if normalizer is None else normalizer.normalize_str(text)
            parts = [normal] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(normal)]
            words.update(parts if is_bytes or is_words else (one for part in parts for one in SPACED.findall(part)))
        for word, count in words.items():
            names = [token.value for token in library.model.tokenize(word)]
            if is_words and any(name not in known or name == content["model"].get("unk_token") for name in names):
                names = [word[0], *(prefix + character for character in word[1:])]
            elif not is_bytes and not is_words:
                names = with_characters(names, known)
            for part in [names] if is_bytes or is_words else words_in(names):
                found[tuple(part)] += count
    return found


SPACED = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
"""The words of a text whose spaces are U+2581."""
