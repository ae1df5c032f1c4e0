"""Smaller vocabularies: the files of a tokenizer with some of its pieces, in their old order.

Texts of kept pieces only get the same pieces as before. Of byte pairs that holds if all pieces are kept through which a kept
one is merged: in the whole vocabulary no merge with an earlier rank was possible, so none is in a part of it. The most
probable segmentation of a unigram model, and the longest matches of WordPiece, are still there, and others are only fewer.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.files import json_of
from llmctl.tokenizer.added import AddedTokens
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.huggingface import HuggingFaceTokenizer, byte_characters
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.protobuf import bytes_field, fields, varint_field
from llmctl.tokenizer.published_sentencepiece import PublishedPieces
from llmctl.tokenizer.sentencepiece import BYTE, MODEL_FILE, PIECES, SPACE, SentencePieceTokenizer, is_bpe
from llmctl.tokenizer.sentencepiece_classes import CONFIG, VOCABULARY

JSON = "tokenizer.json"
OTHER_FORMS = ("vocab.txt", VOCABULARY, "encoder.json", "merges.txt", "vocab.bpe", MODEL_FILE)
"""Files that say of the vocabulary what `tokenizer.json` does: only that is written again."""

NORMAL, UNUSED = 1, 5
"""Types of sentencepiece's pieces: those of text, and those that it makes of smaller ones again."""

TRAINER, SELF_TEST, VOCAB_SIZE = 2, 4, 4
"""Fields of a sentencepiece model: what it was trained with, with the size of the vocabulary, and examples of ids."""

ROLES = ("pad", "unk", "bos", "eos", "mask")
ID_KEYS = ("token_id", "token_ids", "suppress_tokens")
"""How the settings of generation_config.json end that are ids."""

Rank = Callable[[str, str], float | None]
"""Two neighbors -> how early they are merged; None if they are not."""


class Trimmed(NamedTuple):
    """A tokenizer, its files, and the earlier id of each of its ids."""

    tokenizer: Tokenizer
    files: dict[str, bytes]
    kept: list[int]


class Vocabulary(NamedTuple):
    """The pieces in a tokenizer's files.

    needed: ids that always stay. parts: id -> others that it is merged from. write: ids that stay, in order, with their new
    ids -> the files; None for one that is not to be kept.
    """

    needed: set[int]
    parts: Callable[[int], set[int]]
    write: Callable[[Mapping[int, int]], dict[str, bytes | None]]


def trim(tokenizer: Tokenizer, files: Mapping[str, bytes], ranked: Iterable[int], most: int = 0) -> Trimmed:
    """Return a tokenizer with the special tokens, bytes and characters of another, and its pieces in `ranked`.

    files: those of its model. most: the largest vocabulary, 0 for any; of the pieces, the first ones are taken. Characters
    are left out if bytes can take their place.
    Raises: UnsupportedModelError for a kind of tokenizer that cannot be trimmed; UsageError if `most` is too small.
    """
    base = tokenizer.base if isinstance(tokenizer, AddedTokens) else tokenizer
    vocabulary = vocabulary_of(base)
    roles = {getattr(tokenizer, f"{role}_id") for role in ROLES} - {None}
    kept = vocabulary.needed | roles | {token.token_id for token in tokenizer.special_tokens().values()}
    if isinstance(tokenizer, AddedTokens):
        kept |= set(tokenizer.entries)
    if most and len(kept) > most:
        raise UsageError(
            f"`--vocab-size {most}` is smaller than the {len(kept):,} special tokens, bytes and characters that stay",
            f"`--vocab-size` of at least {len(kept)}",
        )
    for index in ranked:
        more = {index, *vocabulary.parts(index)} - kept if index < base.vocab_size else set()
        if not most or len(kept) + len(more) <= most:
            kept |= more
    order = sorted(kept)
    new_of = {index: place for place, index in enumerate(order)}
    written = vocabulary.write({index: new for index, new in new_of.items() if index < base.vocab_size})
    result = {name: data for name, data in {**files, **written}.items() if data is not None}
    result |= renumbered(result, new_of)
    new = tokenizer_from_files(result)
    assert [new.piece(index) for index in range(new.vocab_size)] == [tokenizer.piece(index) for index in order]
    return Trimmed(new, result, order)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return what is known of the pieces of a tokenizer.

    Raises: UnsupportedModelError.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return of_json(json_of(tokenizer.files(), JSON))
    if isinstance(tokenizer, SentencePieceTokenizer):
        return of_model(tokenizer.files()[MODEL_FILE])
    if isinstance(tokenizer, PublishedPieces) and not tokenizer.has_target_vocabulary:
        return of_names(tokenizer) if tokenizer.kind.vocabulary else of_class(tokenizer)
    raise UnsupportedModelError(
        "a tokenizer with a vocabulary for each language cannot be trimmed",
        "supported: tokenizer.json, tokenizer.model, spiece.model, spm.model, sentencepiece.bpe.model, vocab.json",
    )


def merged_from(symbols: list[str], rank: Rank, joined: Callable[[str, str], str] = str.__add__) -> set[str]:
    """Return the pieces through which symbols become one piece, by merging the neighbors of the earliest rank first.

    Empty if they do not become one.
    """
    passed = set(symbols)
    while len(symbols) > 1:
        ranks = [rank(left, right) for left, right in pairwise(symbols)]
        best = min((one for one in ranks if one is not None), default=None)
        if best is None:
            return set()
        at = ranks.index(best)
        symbols = [*symbols[:at], joined(symbols[at], symbols[at + 1]), *symbols[at + 2 :]]
        passed.add(symbols[at])
    return passed


# --- tokenizer.json ----------------------------------------------------------------------------------------------------


def of_json(content: dict[str, Any]) -> Vocabulary:
    """Return the pieces of a `tokenizer.json`: BPE, Unigram, WordPiece or WordLevel."""
    model, added = content["model"], content.get("added_tokens") or []
    listed = model["vocab"]
    pieces = {piece: index for index, (piece, _) in enumerate(listed)} if isinstance(listed, list) else dict(listed)
    prefix, ending = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    if not prefix and model.get("type") == "WordPiece":
        prefix = "##"
    needed = {entry["id"] for entry in added}
    needed |= {pieces[token] for token in [model.get("unk_token")] if token in pieces}
    needed |= {model["unk_id"]} if model.get("unk_id") is not None else set()
    is_bytes = '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    alphabet = set(byte_characters().values())
    for piece, index in pieces.items():
        character = piece.removeprefix(prefix).removesuffix(ending) or piece
        if BYTE.fullmatch(piece) if model.get("byte_fallback") else len(character) == 1:
            needed |= {index} if not is_bytes or character in alphabet else set()
    if isinstance(listed, list):  # an unknown character costs 10 more than the least probable piece
        needed.add(min(range(len(listed)), key=lambda index: listed[index][1]))
    parts = merges_of(model, pieces, prefix, ending) if "merges" in model else lambda _: set()
    return Vocabulary(needed, parts, partial(written_json, content))


def merges_of(
    model: Mapping[str, Any], pieces: Mapping[str, int], prefix: str, ending: str
) -> Callable[[int], set[int]]:
    """Return what tells the pieces that a piece is merged from."""
    ranks = {pair: rank for rank, pair in enumerate(map(pair_of, model["merges"]))}
    names = {index: piece for piece, index in pieces.items()}

    def parts(index: int) -> set[int]:
        piece = names.get(index, "")
        inner = bool(prefix) and piece.startswith(prefix)
        characters = list(piece.removeprefix(prefix).removesuffix(ending))
        symbols = [prefix + one if inner or place else one for place, one in enumerate(characters)]
        if ending and symbols and piece.endswith(ending):
            symbols[-1] += ending
        passed = merged_from(symbols, lambda *pair: ranks.get(pair), lambda a, b: a + b.removeprefix(prefix))
        return {pieces[name] for name in passed if name in pieces}

    return parts


def pair_of(merge: str | list[str]) -> tuple[str, str]:
    """Return the two sides of a merge, which older files join by a space."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def written_json(content: dict[str, Any], new_of: Mapping[int, int]) -> dict[str, bytes | None]:
    """Return the files of a `tokenizer.json` with some pieces; older files beside it are not kept."""
    model = dict(content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_of]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_of[model["unk_id"]]
    else:
        model["vocab"] = {piece: new_of[index] for piece, index in model["vocab"].items() if index in new_of}
        prefix = model.get("continuing_subword_prefix") or ""
        if "merges" in model:
            model["merges"] = [
                merge
                for merge in model["merges"]
                for left, right in [pair_of(merge)]
                if {left, right, left + right.removeprefix(prefix)} <= model["vocab"].keys()
            ]
    added = [{**entry, "id": new_of[entry["id"]]} for entry in content.get("added_tokens") or []]
    new = {**content, "model": model, "added_tokens": added}
    new["post_processor"] = renumbered_processor(content.get("post_processor"), new_of)
    data = json.dumps(new, ensure_ascii=False, separators=(",", ":")).encode()
    return {**dict.fromkeys(OTHER_FORMS), JSON: data}


def renumbered_processor(part: Any, new_of: Mapping[int, int]) -> Any:
    """Return a post-processor with new ids."""
    if not isinstance(part, dict):
        return part
    new = dict(part)
    if isinstance(part.get("processors"), list):
        new["processors"] = [renumbered_processor(each, new_of) for each in part["processors"]]
    if isinstance(part.get("special_tokens"), dict):
        new["special_tokens"] = {
            name: {**token, "ids": [new_of[index] for index in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
    for role in ("sep", "cls"):
        if isinstance(part.get(role), list):
            new[role] = [part[role][0], new_of[part[role][1]]]
    return new


# --- sentencepiece -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A sentencepiece model: names, scores and types of its pieces, the bytes of each, and those of all other fields."""

    names: list[str]
    scores: list[float]
    types: list[int]
    raw: list[bytes]
    rest: bytes
    is_bpe: bool

    @classmethod
    def read(cls, proto: bytes) -> "Model":
        """Read a sentencepiece model."""
        raw, rest = [], b""
        for number, value in fields(proto):
            assert isinstance(value, bytes)
            if number == PIECES:
                raw.append(value)
            elif number != SELF_TEST:  # whose ids would be wrong
                rest += bytes_field(number, value)
        known = [dict(fields(piece)) for piece in raw]
        names = [bytes(piece.get(1, b"")).decode() for piece in known]
        scores = [float(struct.unpack("<f", piece.get(2, bytes(4)))[0]) for piece in known]  # type: ignore[arg-type]
        return cls(names, scores, [int(piece.get(3, NORMAL)) for piece in known], raw, rest, is_bpe(proto))

    @property
    def needed(self) -> set[int]:
        """The pieces that always stay: also characters, where no bytes can take their place."""
        has_bytes = any(BYTE.fullmatch(name) for name in self.names)
        special = {index for index, kind in enumerate(self.types) if kind not in (NORMAL, UNUSED)}
        text = [index for index, kind in enumerate(self.types) if kind == NORMAL]
        characters = {index for index in text if len(self.names[index]) == 1 and not has_bytes}
        spaces = {index for index in text if self.names[index] == SPACE}
        # An unknown character costs 10 more than the least probable piece.
        least = {min(text, key=self.scores.__getitem__)} if text and not self.is_bpe else set()
        return special | characters | spaces | least

    def parts(self, index: int) -> set[int]:
        """Return the pieces that a piece is merged from."""
        if not self.is_bpe:
            return set()
        passed = merged_from(list(self.names[index]), self._rank)
        return {self.places[name] for name in passed if name in self.places}

    def _rank(self, left: str, right: str) -> float | None:
        place = self.places.get(left + right)
        return None if place is None else -self.scores[place]

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of every piece of text."""
        return {name: index for index, name in enumerate(self.names) if self.types[index] == NORMAL}

    def written(self, kept: Iterable[int]) -> bytes:
        """Return the model with some of its pieces."""
        pieces = [bytes_field(PIECES, self.raw[index]) for index in sorted(kept)]
        size = bytes_field(TRAINER, varint_field(VOCAB_SIZE, len(pieces)))  # the last value counts
        return b"".join(pieces) + self.rest + size

    def with_pieces(self, new: Sequence[bytes]) -> bytes:
        """Return the model with more pieces behind the others."""
        pieces = [bytes_field(PIECES, one) for one in (*self.raw, *new)]
        return b"".join(pieces) + self.rest + bytes_field(TRAINER, varint_field(VOCAB_SIZE, len(pieces)))


def of_model(proto: bytes) -> Vocabulary:
    """Return the pieces of a `tokenizer.model`, whose ids are their places."""
    model = Model.read(proto)

    def write(new_of: Mapping[int, int]) -> dict[str, bytes | None]:
        # What stands beside a model is not read, and ours is written again.
        return {**dict.fromkeys((JSON, *OTHER_FORMS)), MODEL_FILE: model.written(new_of)}

    return Vocabulary(model.needed, model.parts, write)


def of_class(tokenizer: PublishedPieces) -> Vocabulary:
    """Return the pieces of a class that moves the ids of its model, such as XLM-R's."""
    name, kind = tokenizer.kind.model, tokenizer.kind
    model, place_of = Model.read(tokenizer.files()[name]), tokenizer.places()
    id_of = {place: index for index, place in place_of.items()}
    own = {index for index in range(tokenizer.vocab_size) if index not in place_of}
    needed = own | {id_of[place] for place in model.needed if place in id_of}

    def parts(index: int) -> set[int]:
        return (
            {id_of[place] for place in model.parts(place_of[index]) if place in id_of} if index in place_of else set()
        )

    def write(new_of: Mapping[int, int]) -> dict[str, bytes | None]:
        places = {place_of[index] for index in new_of if index in place_of}
        return {name: model.written({*range(kind.n_replaced), *places})}

    return Vocabulary(needed, parts, write)


def of_names(tokenizer: PublishedPieces) -> Vocabulary:
    """Return the pieces of a class whose `vocab.json` gives them ids, such as Marian's, with a model for each language."""
    files = tokenizer.files()
    ids: dict[str, int] = json_of(files, VOCABULARY)
    models = {name: Model.read(files[name]) for name in (tokenizer.kind.model, tokenizer.kind.target) if name}
    known = {name for model in models.values() for name in model.names}
    always = {model.names[index] for model in models.values() for index in model.needed}
    needed = {index for name, index in ids.items() if name not in known or name in always}

    def parts(index: int) -> set[int]:
        name = tokenizer.piece(index)
        passed = {
            model.names[part]
            for model in models.values()
            if name in model.places
            for part in model.parts(model.places[name])
        }
        return {ids[part] for part in passed if part in ids}

    def write(new_of: Mapping[int, int]) -> dict[str, bytes | None]:
        names = {name: new_of[index] for name, index in ids.items() if index in new_of}
        # Pieces without an id are unknown text, and stay that.
        return {
            VOCABULARY: json.dumps(names, ensure_ascii=False, indent=1).encode(),
            **{
                file: model.written(index for index, name in enumerate(model.names) if name in names or name not in ids)
                for file, model in models.items()
            },
        }

    return Vocabulary(needed, parts, write)


# --- files beside ------------------------------------------------------------------------------------------------------


def renumbered(files: Mapping[str, bytes], new_of: Mapping[int, int]) -> dict[str, bytes]:
    """Return the files beside a vocabulary that have ids of tokens, with new ones."""
    found: dict[str, Any] = {}
    config = json_of(files, CONFIG)
    if isinstance(config.get("added_tokens_decoder"), dict):
        entries = config["added_tokens_decoder"].items()
        listed = {str(new_of[int(index)]): entry for index, entry in entries if int(index) in new_of}
        found[CONFIG] = {**config, "added_tokens_decoder": listed}
    if "added_tokens.json" in files:
        added = json_of(files, "added_tokens.json")
        found["added_tokens.json"] = {token: new_of[index] for token, index in added.items() if index in new_of}
    generation = json_of(files, "generation_config.json")
    if generation:
        found["generation_config.json"] = {
            key: new_ids(value, new_of) if key.endswith(ID_KEYS) else value for key, value in generation.items()
        }
    return {
        name: (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode() for name, content in found.items()
    }


def new_ids(value: Any, new_of: Mapping[int, int]) -> Any:
    """Return an id, or a list of ids, by their new numbers; those that are gone are left out."""
    if isinstance(value, list):
        return [new_of[index] for index in value if index in new_of]
    return new_of.get(value) if type(value) is int else value
