"""The files by which sentence-transformers say how an encoder represents a text: modules.json, pooling, prompts.

Source: Reimers and Gurevych 2019, arXiv:1908.10084; the file layout is that of the library sentence-transformers.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.errors import ArtifactError
from llmctl.files import json_of, json_text

MODULES, POOLING, PROMPTS = "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"
SENTENCE_FILES = (MODULES, POOLING, PROMPTS, "sentence_bert_config.json")
"""The files to keep with a model; all are small JSON."""

MODES = {"cls": "first", "mean": "mean", "lasttoken": "last"}
"""The library's pooling -> ours."""
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules whose work is done here; normalizing changes no cosine."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SentenceEncoder:
    """How a text is represented. pooling: our name, empty if the files do not say. prompt: put before each text."""

    pooling: str = ""
    prompt: str = ""


def pooling_files(pooling: str, width: int) -> dict[str, bytes]:
    """Return the files that say how an encoder of this width represents a text."""
    mode = next(mode for mode, ours in MODES.items() if ours == pooling)
    flag = next(flag for flag, name in FLAGS.items() if name == mode)
    package = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{package}.Pooling"},
    ]
    return {
        MODULES: json_text(modules).encode(),
        POOLING: json_text({"word_embedding_dimension": width, flag: True}).encode(),
    }


def sentence_encoder(files: Mapping[str, bytes]) -> SentenceEncoder:
    """Return what the files of a model say.

    Raises: ArtifactError for a damaged file, and for pooling or modules that are not supported.
    """
    for module in json_of(files, MODULES, list):
        kind = str(module.get("type", "") if isinstance(module, dict) else module).rpartition(".")[2]
        if kind not in KNOWN_MODULES:
            raise ArtifactError(
                f"`{MODULES}` has the module `{kind[:60]}`, which is not supported",
                f"supported: {', '.join(KNOWN_MODULES)}",
            )
    pooling: dict[str, Any] = json_of(files, POOLING, dict)
    modes = [mode for flag, mode in FLAGS.items() if pooling.get(flag)]
    if isinstance(pooling.get("pooling_mode"), str):
        modes = [pooling["pooling_mode"]]
    if POOLING in files and (len(modes) != 1 or modes[0] not in MODES):
        raise ArtifactError(
            f"`{POOLING}` asks for the pooling {' and '.join(modes)[:60] or 'none'}, which is not supported",
            f"supported: one of {', '.join(MODES)}",
        )
    settings: dict[str, Any] = json_of(files, PROMPTS, dict)
    prompts, name = settings.get("prompts") or {}, settings.get("default_prompt_name")
    prompt = prompts.get(name, "") if isinstance(prompts, dict) and name is not None else ""
    if isinstance(prompts, dict) and any(prompts.values()) and not prompt:
        log.warning(
            "the model has prompts for %s, and no default: none is used", ", ".join(f"`{key[:40]}`" for key in prompts)
        )
    return SentenceEncoder(MODES[modes[0]] if modes else "", prompt if isinstance(prompt, str) else "")
