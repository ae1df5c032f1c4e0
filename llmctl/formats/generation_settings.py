"""generation_config.json: the ids that end a text."""

from collections.abc import Iterable, Mapping
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.rows import token_ids
from llmctl.files import json_text, parse_json

GENERATION = "generation_config.json"


def generation_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the content of generation_config.json, empty if it is missing or not a JSON object."""
    try:
        content = parse_json(files.get(GENERATION, b"{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def default_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a model that has none of its own: its special tokens."""
    return {key: value for key, value in token_ids(config).items() if value is not None and key != "mask_token_id"}


def listed_ids(value: Any) -> list[int]:
    """Return the token ids of `eos_token_id`, which is an id, a list of ids or null."""
    return [index for index in (value if isinstance(value, list) else [value]) if type(index) is int and index >= 0]


def end_ids(config: ModelConfig, files: Mapping[str, bytes]) -> list[int]:
    """Return the ids that end a text: the config's, then the others of generation_config.json."""
    named = listed_ids(generation_settings(files).get("eos_token_id"))
    return list(dict.fromkeys([*([config.eos_id] if config.eos_id >= 0 else []), *named]))


def forced_first_id(config: ModelConfig, files: Mapping[str, bytes]) -> int | None:
    """Return the token that an encoder-decoder's answers begin with, if its settings force one (BART's `<s>`)."""
    index = generation_settings(files).get("forced_bos_token_id")
    is_forced = config.family == "encoder_decoder" and type(index) is int and 0 <= index < config.vocab_size
    return index if is_forced else None


UNUSED = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
}
"""Settings of other programs that change what is generated, which options decide here, with their defaults there."""


def unused_settings(files: Mapping[str, bytes]) -> str:
    """Return a sentence that names the settings of generation_config.json which are not used; empty if there are none."""
    found = generation_settings(files)
    named = {key: found[key] for key, default in UNUSED.items() if found.get(key) not in (None, default)}
    if not named:
        return ""
    listed = ", ".join(f"{key} {str(value)[:40]}" for key, value in named.items())
    return f"not used from {GENERATION}: {listed}; options such as --temperature and --beams decide"


def with_end_ids(config: ModelConfig, files: Mapping[str, bytes], ids: Iterable[int]) -> dict[str, bytes]:
    """Return a model's files with more ids that end a text in generation_config.json.

    Other programs know the end of a turn only from there.
    """
    found = end_ids(config, files)
    wanted = list(dict.fromkeys([*found, *ids]))
    if wanted == found:
        return dict(files)
    settings = (generation_settings(files) or default_settings(config)) | {
        "eos_token_id": wanted if len(wanted) > 1 else wanted[0]
    }
    return {**files, GENERATION: json_text(settings).encode()}
