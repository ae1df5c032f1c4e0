"""Give a model a classification head, or see that the one it has fits the labels."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmctl.artifacts.load import Loaded
from llmctl.config import ModelConfig
from llmctl.data.labels import Labels
from llmctl.errors import ArtifactError
from llmctl.formats.artifact import read_headers
from llmctl.formats.families.table import family_for
from llmctl.formats.quantization import HEAD
from llmctl.formats.safetensors import read_tensors
from llmctl.model.transformer import LanguageModel

HEADS: dict[str, dict[str, Any]] = {
    "decoder": {"pooling": "last", "pooled_activation": "none"},
    "encoder": {"pooling": "mean", "pooled_activation": "gelu"},
    "encoder_decoder": {"pooling": "last", "pooled_activation": "tanh"},
}
"""The head of a family where its published class has no other."""

POOLER = "pooler.dense."
"""BERT's dense layer over the first state: a published encoder brings one, trained with it."""


def head_config(config: ModelConfig, labels: Labels, n_outputs: int, pooling: str = "auto") -> ModelConfig:
    """Return a model's configuration with a head for these labels: that of its published classifier, if it has one."""
    head: dict[str, Any] = {"n_labels": n_outputs, "labels": labels.names, "problem": labels.problem}
    if pooling != "auto":
        return replace(config, **head, **HEADS[config.family] | {"pooling": pooling})
    bert = replace(config, **head, pooling="first", pooled_activation="tanh")
    if config.family == "encoder" and not family_for(bert).architecture.startswith("Llmctl"):
        return bert
    return replace(config, **head, **HEADS[config.family])


def with_head(base: Loaded, labels: Labels, n_outputs: int, *, pooling: str, seed: int) -> LanguageModel:
    """Return the model with a head for the labels; the body's weights are the base's own, in its few bits if it has them.

    A head that is there already is kept. A new one is drawn anew, except that a published pooler is taken over.
    Raises: ArtifactError if the model has a head for other labels.
    """
    model = base.model
    if model.config.n_labels:
        check_head(base, labels, n_outputs)
        return model
    config = head_config(model.config, labels, n_outputs, pooling)
    with torch.random.fork_rng(devices=[]):
        classifier = LanguageModel(config)
    classifier.quantize({name: scheme for name, scheme in model.schemes.items() if name != HEAD})
    state = classifier.state_dict()
    state |= {name: tensor for name, tensor in model.state_dict().items() if name in state}
    generator = torch.Generator().manual_seed(seed)
    for name in state:
        if name.startswith("classifier"):
            draw = nn.init.zeros_ if name.endswith("bias") else _drawn(config.init_std, generator)
            draw(state[name])
    if config.pooling == "first" and config.pooled_activation == "tanh":
        state |= published_pooler(base)
    classifier.load_state_dict(state)
    return classifier


def _drawn(std: float, generator: torch.Generator) -> Any:
    return lambda tensor: nn.init.normal_(tensor, std=std, generator=generator)


def published_pooler(base: Loaded) -> dict[str, torch.Tensor]:
    """Return BERT's pooler from the model's file, where it holds one."""
    for path, header in read_headers(base.artifact.path).items():
        names = {name: name.rpartition(POOLER)[2] for name in header.tensors if POOLER in name}
        if sorted(names.values()) == ["bias", "weight"]:
            found = read_tensors(path, list(names))
            return {f"classifier_dense.{part}": found[name].float() for name, part in names.items()}
    return {}


def check_head(base: Loaded, labels: Labels, n_outputs: int) -> None:
    """Refuse to go on with a head that is of another size or for other labels.

    Raises: ArtifactError with both.
    """
    config = base.model.config
    same = config.n_labels == n_outputs and config.problem == labels.problem
    if same and (not config.labels or config.labels == labels.names):
        return
    has = f"{config.n_labels} outputs ({config.problem}{': ' + ', '.join(config.labels[:8]) if config.labels else ''})"
    wants = f"{n_outputs} ({labels.problem}{': ' + ', '.join(labels.names[:8]) if labels.names else ''})"
    raise ArtifactError(
        f"the head of `{base.artifact.path}` has {has}, the data asks for {wants}",
        "name its labels with --labels, or start from a model without a head",
    )
