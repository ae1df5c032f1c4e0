"""sentencepiece models of published tokenizers, whose ids are not those of the pieces.

A model only cuts text into pieces; its tokenizer's class says what their ids are, which tokens stand before and behind
them, and what stands around a text (`sentencepiece_classes.py`). Files do not always name their class, and a wrong one
gives wrong ids in silence: `with_class` asks the model's config.json, and what stays unknown is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.files import json_of
from llmctl.tokenizer.base import Frame, Span, SpecialToken, Tokenizer, digest, no_spans
from llmctl.tokenizer.checks import check_ids
from llmctl.tokenizer.sentencepiece import MODEL_FILE, SPACE, SentencePieceTokenizer, as_json, n_threads
from llmctl.tokenizer.sentencepiece_classes import (
    CLASSES,
    CONFIG,
    FAIRSEQ,
    MODEL_FILES,
    SOURCE,
    SPM,
    TARGET,
    TARGET_VOCABULARY,
    VOCABULARY,
    Names,
    Settings,
    content_of,
    named,
)
from llmctl.tokenizer.vocabulary_files import ANY, added_tokens, class_of


class PublishedPieces(Tokenizer):
    """A published tokenizer: a sentencepiece model, and a map from its pieces to the ids of its class.

    is_target: it encodes the targets of an encoder-decoder.
    Raises: ArtifactError if a file is damaged or missing, or its settings are not supported.
    """

    def __init__(self, name: str, files: Mapping[str, bytes], *, is_target: bool = False) -> None:
        self.name, self.kind, self.is_target = name, CLASSES[name], is_target
        kind, self._files = self.kind, dict(files)
        self._config = config = json_of(files, CONFIG)
        model = kind.target if is_target and kind.target else kind.model
        # opus-mt's models with a vocabulary for each language.
        self.has_target_vocabulary = bool(kind.target and config.get("separate_vocabs"))
        vocabulary = TARGET_VOCABULARY if is_target and self.has_target_vocabulary else VOCABULARY
        self._pieces = load_model(model, files)
        self._source = VOCABULARY if kind.vocabulary else model
        own = [self._pieces.piece(index) for index in range(self._pieces.vocab_size)]
        if kind.vocabulary:
            self._ids = self._listed(vocabulary)
            names = {index: piece for piece, index in self._ids.items()}
            self._piece_of: dict[int, int] = {}
            last_id = max(names) + 1
        else:
            first = kind.first(config)
            shift = len(first) - kind.n_replaced
            names = dict(enumerate(first)) | {
                index + shift: piece for index, piece in enumerate(own) if index >= kind.n_replaced
            }
            self._piece_of = {index + shift: index for index in range(kind.n_replaced, len(own))}
            self._ids = {}
            last_id = len(own) + shift
        known = set(names.values())
        more = [token for token in kind.last(config) if token not in known]
        names |= {last_id + number: token for number, token in enumerate(more)}
        self._names = names
        self.vocab_size = max(names) + 1
        ids = {piece: index for index, piece in names.items()}
        controls = [own[token.token_id] for token in self._pieces.special_tokens().values()]
        wanted = [
            *([] if kind.vocabulary else kind.first(config)),
            *more,
            *controls,
            *kind.roles.values(),
            *named(config),
        ]
        wanted += [entry["content"] for entry in added_tokens(config, files).values() if entry.get("special", True)]
        self._special = {token: ids[token] for token in wanted if token in ids}
        self._special_ids = frozenset(self._special.values())
        for role in ("pad", "unk", "bos", "eos", "mask"):
            token = content_of(config.get(f"{role}_token"))
            token = token if isinstance(token, str) and token in ids else kind.roles.get(role)
            setattr(self, f"{role}_id", None if token is None else ids.get(token))
        if self.unk_id is None:
            raise ArtifactError(f"`{self._source}` has no token for unknown text", "download it again")
        if not kind.vocabulary:
            self._row = [self._id_of(own, index, ids, shift) for index in range(len(own))]
        self._frame = self._named_frame(ids)
        settings = {key: config.get(key) for key in ("do_lower_case", "keep_accents", "split_by_punct")}
        self.sha256 = digest(
            {
                model: self._files[model],
                "class": as_json([name, settings, sorted((index, token) for token, index in self._special.items())]),
                **({vocabulary: self._files[vocabulary]} if kind.vocabulary else {}),
                # Ids of targets are those of another vocabulary: tokenizers that differ in it are different.
                **({TARGET: self.for_target.sha256.encode()} if self.has_target_vocabulary and not is_target else {}),
            }
        )

    def _listed(self, vocabulary: str) -> dict[str, int]:
        if vocabulary not in self._files:
            raise ArtifactError(f"`{self.kind.model}` lacks its `{vocabulary}`", "download that file as well")
        ids: dict[str, int] = json_of(self._files, vocabulary)
        check_ids(ids, vocabulary)
        if not ids:
            raise ArtifactError(f"`{vocabulary}` is empty", "download it again")
        return ids

    def _id_of(self, own: Sequence[str], index: int, ids: Mapping[str, int], shift: int) -> int:
        if index >= self.kind.n_replaced and own[index] != self._names[self.unk_id or 0]:
            return index + shift
        return ids.get(own[index], self.unk_id or 0)

    def _named_frame(self, ids: Mapping[str, int]) -> Frame:
        roles = {role: getattr(self, f"{role}_id") for role in ("bos", "eos")}
        if self.kind.language is not None:
            roles["lang"] = self._language(ids, *self.kind.language)
        parts = []
        for part in self.kind.frame(self._config):
            found = [roles[token] if token in roles else ids.get(token) for token in part]
            if None in found:
                role = part[found.index(None)]
                raise ArtifactError(
                    f"`{self._source}` has no `{self.kind.roles.get(role, role)}`, which {self.name}Tokenizer puts "
                    "around texts",
                    "download it again",
                )
            parts.append(tuple(index for index in found if index is not None))
        return Frame(*parts)

    def _language(self, ids: Mapping[str, int], default: str, form: str) -> int:
        source = self._config.get("src_lang")
        named = (self._config.get("tgt_lang") or source) if self.is_target else source
        token = form.format(named or default)
        if token not in ids:
            raise ArtifactError(
                f"`{CONFIG}` names the language `{str(named or default)[:40]}`, which its tokenizer does not know",
                f"name one such as `{default}`",
            )
        return ids[token]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the files only: each worker process builds its own tokenizer."""
        return unpickled, (self.name, self._files, self.is_target)

    @property
    def for_target(self) -> "PublishedPieces":
        """The tokenizer of targets: with their model, and the tokens of their language."""
        return self if not (self.kind.target or self.kind.language) or self.is_target else self._for_target

    @cached_property
    def _for_target(self) -> "PublishedPieces":
        return PublishedPieces(self.name, self._files, is_target=True)

    def frame(self, family: str) -> Frame:  # noqa: ARG002 - the class says it, whatever the model
        """Return the special tokens around a text: those of the class."""
        return self._frame

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, without special tokens."""
        prepare = self.kind.prepare
        texts = [prepare(text, self._config) for text in texts] if prepare else list(texts)
        if self.kind.vocabulary:
            return self._by_name(texts)
        rows = self._pieces.encode_batch(texts)
        if self.kind.splits_numbers:
            rows = [self._split_numbers(row) for row in rows]
        return [[self._row[index] for index in row] for row in rows]

    def encode_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of every text, each with the characters that it stands for.

        Raises: UsageError for a class whose pieces are looked up by name, and for a text that it changes beyond recognition.
        """
        if self.kind.vocabulary:
            raise no_spans()
        return [self._with_spans(text) for text in texts]

    def _with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        prepared, places = self._prepared(text)
        ids: list[int] = []
        spans: list[Span] = []
        for index, (begin, end) in zip(*self._pieces.encode_with_spans([prepared])[0], strict=True):
            own = self._split_numbers([index]) if self.kind.splits_numbers else [index]
            # Digits and the comma after them are parts of one piece, each with all of its characters.
            ids += [self._row[each] for each in own]
            span = (places[begin][0], places[end - 1][1]) if end > begin else (places[begin][0],) * 2
            spans += [span] * len(own)
        return ids, spans

    def _prepared(self, text: str) -> tuple[str, list[Span]]:
        """Return a text as its class changes it, and the place of every character in the original, then of its end."""
        prepare, end = self.kind.prepare, (len(text), len(text))
        if prepare is None:
            return text, [*((at, at + 1) for at in range(len(text))), end]
        changed, places = "", list[Span]()
        for match in UNITS.finditer(text):
            # A space is kept or joined with its neighbors between others only.
            is_space = match[0].isspace()
            new = prepare(f"a{match[0]}a" if is_space else match[0], self._config)
            new = new[1:-1] if is_space else new
            changed += new
            places += [match.span()] * len(new)
        whole = prepare(text, self._config)
        first = len(changed) - len(changed.lstrip()) if whole[:1] != changed[:1] else 0
        if changed[first : first + len(whole)] != whole:
            raise no_spans()
        return whole, [*places[first : first + len(whole)], end]

    def _by_name(self, texts: Sequence[str]) -> list[list[int]]:
        # Pieces are looked up by name: a character that the model does not know may stand in the vocabulary.
        codes, rests = zip(*(self._code(text) for text in texts), strict=True) if texts else ((), ())
        rows = self._pieces.named_pieces(rests, n_threads(len(rests)))
        unknown = self.unk_id or 0
        return [
            [self._ids.get(piece, unknown) for piece in [*code, *row]] for code, row in zip(codes, rows, strict=True)
        ]

    def _code(self, text: str) -> tuple[list[str], str]:
        found = CODE.match(text) if self.kind.codes else None
        return ([found[0]], text[found.end() :]) if found else ([], text)

    def _split_numbers(self, row: list[int]) -> list[int]:
        """Encode digits and the comma that follows them apart, where one piece has both."""
        out: list[int] = []
        for index in row:
            piece = self._pieces.piece(index)
            if len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
                number = piece.removesuffix(",")
                out += self._pieces.encode_next(number.replace(SPACE, " "), after_special=False)
                out += self._pieces.encode_next(",", after_special=False)
            else:
                out.append(index)
        return out

    def encode_next(self, text: str, *, after_special: bool) -> list[int]:
        """Return the ids of a text that continues another, without the dummy space inside a word.

        After a special token there is one, as in transformers; of a text's own first spaces it takes the place.
        """
        if after_special or text[:1].isspace() or self.kind.vocabulary or self.kind.prepare:
            return self.encode(text)
        return [self._row[index] for index in self._pieces.encode_next(text, after_special=after_special)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are omitted, invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace").removeprefix(" ")

    def piece(self, index: int) -> str:
        """Return the piece of an id as written in the vocabulary."""
        return self._names.get(index, "")

    def piece_bytes(self, index: int) -> bytes:
        """Return the UTF-8 bytes of an id, empty for a special token."""
        if index in self._special_ids or index not in self._names:
            return b""
        if index in self._piece_of:
            return self._pieces.piece_bytes(self._piece_of[index])
        return self._names[index].replace(SPACE, " ").encode()

    def places(self) -> dict[int, int]:
        """Return id -> place in the sentencepiece model, of the ids that stand for one of its pieces."""
        return dict(self._piece_of)

    def special_id(self, text: str) -> int | None:
        """Return the id of a special token, None if it does not exist."""
        return self._special.get(text)

    def special_tokens(self) -> dict[str, SpecialToken]:
        """Return all special tokens by name; a mask takes the space before it."""
        return {token: SpecialToken(index, index == self.mask_id) for token, index in self._special.items()}

    def files(self) -> dict[str, bytes]:
        """Return the files the tokenizer was loaded from, of which the config names the class."""
        return with_name(self._files, self.name)


UNITS = re.compile(r"``|''|\s+|\S")
CODE = re.compile(r">>.*?<<", re.DOTALL)


def unpickled(name: str, files: Mapping[str, bytes], is_target: bool) -> PublishedPieces:
    """Build a tokenizer again in another process."""
    return PublishedPieces(name, files, is_target=is_target)


def load_model(name: str, files: Mapping[str, bytes]) -> SentencePieceTokenizer:
    """Load one of the sentencepiece models.

    Raises: ArtifactError naming the file if it is missing or damaged.
    """
    if name not in files:
        raise ArtifactError(f"the tokenizer lacks its `{name}`", "download that file as well")
    try:
        return SentencePieceTokenizer(files[name], {CONFIG: files[CONFIG]} if CONFIG in files else None)
    except ArtifactError as error:
        raise ArtifactError(str(error).replace(MODEL_FILE, name), error.hint) from None


ALIASES = {"MT5": "T5"}
MODEL_TYPES: dict[str, Names] = {
    "t5": ("T5",),
    "mt5": ("T5",),
    "umt5": ("T5",),
    "longt5": ("T5",),
    "pegasus": ("Pegasus",),
    "albert": ("Albert",),
    "big_bird": ("BigBird",),
    "deberta-v2": ("DebertaV2",),
    "xlm-roberta": ("XLMRoberta",),
    "camembert": ("Camembert",),
    "mbart": ("MBart", "MBart50"),
    "m2m_100": ("M2M100", "Nllb"),
    "xglm": ("XGLM",),
    "marian": ("Marian",),
}
"""The classes of a model's tokenizer, by `model_type` in config.json; of several, the sizes of the vocabularies decide."""


def class_name(files: Mapping[str, bytes]) -> str:
    """Return the class that the files name, or whose files no other class has; empty if that is unknown."""
    name = class_of(json_of(files, CONFIG))
    if name not in ANY:
        return ALIASES.get(name, name)
    if SOURCE in files and TARGET in files and VOCABULARY in files:
        return "Marian"
    return "DebertaV2" if SPM in files else ""


def is_published(files: Mapping[str, bytes]) -> bool:
    """Tell whether the files are those of a published sentencepiece tokenizer that no other file describes."""
    return any(name in files for name in MODEL_FILES) and not {MODEL_FILE, "tokenizer.json"} & files.keys()


def with_class(files: Mapping[str, bytes], model: Settings) -> dict[str, bytes]:
    """Return a tokenizer's files, in which the config names the class that the model's config.json tells.

    `tokenizer_class` there, else `model_type`: of its classes, the one whose vocabulary fits; nothing changes if none
    does, if the files name it already, or if they are damaged.
    """
    if not is_published(files):
        return dict(files)
    try:
        if class_name(files):
            return dict(files)
        name = class_of(model)
        if name not in ANY:
            return with_name(files, ALIASES.get(name, name))
        found = [name for name in candidates(files, model) if name in CLASSES]
    except ArtifactError:
        return dict(files)
    return with_name(files, found[0]) if len(found) == 1 else dict(files)


def candidates(files: Mapping[str, bytes], model: Settings) -> list[str]:
    """Return the classes that a model's tokenizer can have, by its type and the size of its vocabulary."""
    names, size = MODEL_TYPES.get(str(model.get("model_type")), ()), model.get("vocab_size")
    names = tuple(name for name in names if CLASSES[name].model in files)
    if "M2M100" in names:
        return ["M2M100" if VOCABULARY in files else "Nllb"]
    if len(names) == 1:
        return list(names)
    if not names and FAIRSEQ in files:  # a BERT with XLM-R's vocabulary, as of MiniLM
        names = ("XLMRoberta",)
    return [name for name in names if PublishedPieces(name, files).vocab_size == size]


def with_name(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Return the files with the class in their config, unless one is named there."""
    config = json_of(files, CONFIG)
    if class_of(config) not in ANY:
        return dict(files)
    return {**files, CONFIG: as_json({**config, "tokenizer_class": f"{name}Tokenizer"})}


def from_sentencepiece(files: Mapping[str, bytes]) -> PublishedPieces:
    """Build the tokenizer of the class that the files name.

    Raises: ArtifactError if it is unknown, as the ids of the pieces then are, or if a file is damaged.
    """
    name = class_name(files)
    found = next(file for file in MODEL_FILES if file in files)
    supported = ", ".join(f"{key}Tokenizer" for key, kind in CLASSES.items() if kind.model == found)
    if not name:
        raise ArtifactError(
            f"`{found}` does not tell which tokenizer class it is of, and so not the ids of its pieces",
            f"name it as `tokenizer_class` in `{CONFIG}`; supported: {supported}",
        )
    if name not in CLASSES:
        raise ArtifactError(
            f"`{str(json_of(files, CONFIG).get('tokenizer_class'))[:60]}` reads `{found}` in a way of its own, which "
            "llmctl does not support",
            f"supported: {supported}; or save it as `tokenizer.json` with transformers: "
            "AutoTokenizer.from_pretrained(X).save_pretrained(X)",
        )
    return PublishedPieces(name, files)
