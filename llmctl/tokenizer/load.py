"""Load a tokenizer from a file, a folder, or the files in a model's header."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.files import json_of, parse_json, read_own, recognized
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.header_files import PLAIN, files_in_metadata
from llmctl.tokenizer.published_sentencepiece import (
    from_sentencepiece,
    is_published,
    with_class,
)
from llmctl.tokenizer.sentencepiece import MODEL_FILE, SentencePieceTokenizer
from llmctl.tokenizer.sentencepiece_classes import MODEL_FILES, SOURCE, TARGET, TARGET_VOCABULARY, additional_tokens

KNOWN_FILES = (
    MODEL_FILE,
    *MODEL_FILES,
    TARGET,
    TARGET_VOCABULARY,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "encoder.json",
    "vocab.json",
    "vocab.bpe",
    "merges.txt",
    "chat_template.jinja",
)
KNOWN_KINDS = (
    "supported: tokenizer.model, tokenizer.json, vocab.txt, vocab.json with merges.txt, spiece.model, spm.model, "
    "sentencepiece.bpe.model, or source.spm and target.spm with vocab.json"
)
MAX_HEADER_BYTES = 100_000_000

MERGES_FILES = ("vocab.json", "encoder.json", "merges.txt", "vocab.bpe", "tokenizer_config.json", "added_tokens.json")
PIECES_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    SOURCE,
    TARGET,
    TARGET_VOCABULARY,
)
NEEDED_BESIDE: dict[str, tuple[str, ...]] = {
    MODEL_FILE: (),
    **dict.fromkeys(MERGES_FILES[:4], MERGES_FILES),
    **dict.fromkeys((*MODEL_FILES, TARGET, TARGET_VOCABULARY), PIECES_FILES),
}
"""The companion files that each kind of tokenizer file needs; all other kinds need only the config."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a tokenizer file of any known kind, or a single-file model.

    Raises: NotFoundError, UsageError for an unknown kind of file, ArtifactError for a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"tokenizer `{path}` does not exist", "`llmctl tokenize train` creates one")
    if path.is_dir():
        files = {name: read_own(path / name) for name in KNOWN_FILES if (path / name).is_file()}
        if not files and (path / "tokenizer").is_dir():
            return load_tokenizer(path / "tokenizer")
    elif path.suffix == ".safetensors":
        files = files_in_header(path)
    else:
        files = files_of(path)
    try:
        tokenizer = find_tokenizer(with_class(files, config_beside(path)))
    except ArtifactError as error:
        raise ArtifactError(f"the tokenizer in `{path}` cannot be read: {error}", error.hint) from error
    if tokenizer is None:
        raise UsageError(f"`{path}` contains no tokenizer of a known kind", KNOWN_KINDS)
    return tokenizer


def config_beside(path: Path) -> dict[str, Any]:
    """Return the config.json of the model that a tokenizer's folder or file is of; empty if there is none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        content = parse_json(read_own(config)) if config.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def files_of(path: Path) -> dict[str, bytes]:
    """Read a tokenizer file, under its standard name, and the companion files in its folder."""
    if path.name in KNOWN_FILES:
        kind = path.name
    else:
        kind = {".model": MODEL_FILE, ".txt": "vocab.txt", ".json": "tokenizer.json"}.get(path.suffix, path.name)
    names = NEEDED_BESIDE.get(kind, ("tokenizer_config.json",))
    companions = {name: path.parent / name for name in names if (path.parent / name).is_file()}
    return {name: read_own(file) for name, file in companions.items()} | {kind: path.read_bytes()}


def find_tokenizer(files: Mapping[str, bytes]) -> Tokenizer | None:
    """Build the tokenizer that these files define, None if they define none."""
    own = {name: data for name, data in files.items() if name in KNOWN_FILES}
    if MODEL_FILE in files:
        extra = {name: data for name, data in own.items() if name != MODEL_FILE}
        tokenizer = SentencePieceTokenizer(files[MODEL_FILE], extra)
        # A published `tokenizer.model` lacks the tokens that were added later, which `tokenizer.json` has; ours has all.
        if tokenizer.is_lossless or "tokenizer.json" not in files:
            return with_added(tokenizer, extra)
    # Most specific first: models often have several files, of which tokenizer.json is complete by itself.
    if "tokenizer.json" in files:
        from llmctl.tokenizer.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(files["tokenizer.json"], own)
    if "vocab.txt" in files:
        from llmctl.tokenizer.vocabulary_files import from_word_pieces

        return from_word_pieces(files["vocab.txt"], own)
    if is_published(own):
        published = from_sentencepiece(own)
        return with_added(published, own, additional_tokens(json_of(own, "tokenizer_config.json")))
    vocabulary = files.get("vocab.json") or files.get("encoder.json")
    merges = files.get("merges.txt") or files.get("vocab.bpe")
    if vocabulary and merges:
        from llmctl.tokenizer.vocabulary_files import from_merges

        return from_merges(vocabulary, merges, own)
    return None


def with_added(tokenizer: Tokenizer, files: Mapping[str, bytes], unlisted: Sequence[str] = ()) -> Tokenizer:
    """Return the tokenizer with the tokens that the files beside a sentencepiece model add to it.

    unlisted: special tokens for which no file gives an id; those that are not there come last.

    Raises: ArtifactError if they are damaged.
    """
    from llmctl.tokenizer.vocabulary_files import added_tokens

    config = json_of(files, "tokenizer_config.json")
    entries = added_tokens(config, files)
    # Published files list the tokens of the vocabulary again. Texts are split at those that are not special.
    new = {
        index: entry
        for index, entry in entries.items()
        if index >= tokenizer.vocab_size
        or tokenizer.piece(index) != entry["content"]
        or (not entry.get("special", True) and tokenizer.special_id(entry["content"]) is None)
    }
    known = {entry["content"] for entry in entries.values()}
    known |= {tokenizer.piece(index) for index in range(tokenizer.vocab_size)} if unlisted else set()
    end = max([tokenizer.vocab_size, *(index + 1 for index in new)])
    missing = [token for token in dict.fromkeys(unlisted) if token not in known]
    new |= {end + number: {"content": token, "special": True} for number, token in enumerate(missing)}
    if not new:
        return tokenizer
    from llmctl.tokenizer.added import AddedTokens

    return AddedTokens(tokenizer, new, config)


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """Build the tokenizer that these files define.

    Raises: UsageError if they define none.
    """
    tokenizer = find_tokenizer(files)
    if tokenizer is None:
        listed = ", ".join(f"`{name}`" for name in files) or "an empty list of files"
        raise UsageError(f"there is no tokenizer in {listed}", KNOWN_KINDS)
    return tokenizer


def files_in_header(path: Path) -> dict[str, bytes]:
    """Read the files in a single-file model's header (`llmctl.files`), without loading tensors.

    Raises: UsageError if it contains none, ArtifactError if the header is damaged.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(8)
            length = int.from_bytes(head[:8], "little")
            if length > path.stat().st_size and (known := recognized(head)) is not None:
                raise ArtifactError(f"`{path}` is not a safetensors file, but {known[0]}", known[1])
            if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size):
                raise ArtifactError(
                    f"`{path}` claims a header of {length} bytes, which is impossible", "download it again"
                )
            header = parse_json(file.read(length))
        files = files_in_metadata(header["__metadata__"])
        if files is None:
            raise KeyError(PLAIN)
        return {name: data for name, data in files.items() if name in KNOWN_FILES}
    except KeyError:
        raise UsageError(
            f"`{path}` contains no tokenizer in its header", "pass its folder, or a tokenizer file"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"`{path}` has a damaged header: {error}", "download it again") from None
