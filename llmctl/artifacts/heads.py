"""Add a classification head to a model, or check that the existing one fits the labels."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmctl.artifacts.load import Loaded
from llmctl.config import ModelConfig
from llmctl.data.labels import Labels
from llmctl.errors import ArtifactError
from llmctl.families.table import family_for
from llmctl.formats.artifact import read_headers
from llmctl.formats.quantization import HEAD
from llmctl.formats.safetensors import read_tensors
from llmctl.model.quantized import quantize, schemes_of
from llmctl.model.transformer import LanguageModel

HEADS: dict[str, dict[str, Any]] = {
    "decoder": {"pooling": "last", "pooled_activation": "none"},
    "encoder": {"pooling": "mean", "pooled_activation": "gelu"},
    "encoder_decoder": {"pooling": "last", "pooled_activation": "tanh"},
}
"""The default head of each family; BERT-like encoders use `first` with `tanh` instead, as published."""

POOLER = "pooler.dense."
"""BERT's dense layer over the first token's hidden state; published encoders contain a pretrained one."""


def head_config(config: ModelConfig, labels: Labels, n_outputs: int, pooling: str = "auto") -> ModelConfig:
    """Add a head for these labels to a config: with `auto`, the head of the architecture's published classifier."""
    head: dict[str, Any] = {"n_labels": n_outputs, "labels": labels.names, "problem": labels.problem}
    if pooling != "auto":
        return replace(config, **head, **HEADS[config.family] | {"pooling": pooling})
    bert = replace(config, **head, pooling="first", pooled_activation="tanh")
    if config.family == "encoder" and not family_for(bert).architecture.startswith("Llmctl"):
        return bert
    return replace(config, **head, **HEADS[config.family])


def with_head(base: Loaded, labels: Labels, n_outputs: int, *, pooling: str, seed: int) -> LanguageModel:
    """Return the model with a head for the labels; a quantized base stays quantized.

    An existing head is kept. A new one is initialized randomly, except that a pretrained pooler is reused.
    Raises: ArtifactError if the model has a head for other labels.
    """
    model = base.model
    if model.config.n_labels:
        check_head(base, labels, n_outputs)
        return model
    config = head_config(model.config, labels, n_outputs, pooling)
    if config.family == "decoder" and config.pad_id < 0:
        # Other programs find the last token of a padded row by it; texts to classify have no end token.
        config = replace(config, pad_id=config.eos_id)
    with torch.random.fork_rng(devices=[]):
        classifier = LanguageModel(config)
    quantize(classifier, {name: scheme for name, scheme in schemes_of(model).items() if name != HEAD})
    state = classifier.state_dict()
    state |= {name: tensor for name, tensor in model.state_dict().items() if name in state}
    generator = torch.Generator().manual_seed(seed)
    for name in state:
        if name.startswith("classifier"):
            initialize = nn.init.zeros_ if name.endswith("bias") else _normal(config.init_std, generator)
            initialize(state[name])
    if config.pooling == "first" and config.pooled_activation == "tanh":
        state |= published_pooler(base)
    classifier.load_state_dict(state)
    return classifier


def _normal(std: float, generator: torch.Generator) -> Any:
    return lambda tensor: nn.init.normal_(tensor, std=std, generator=generator)


def published_pooler(base: Loaded) -> dict[str, torch.Tensor]:
    """Read BERT's pooler from the base's weight files; empty if they have none."""
    for path, header in read_headers(base.artifact.path).items():
        names = {name: name.rpartition(POOLER)[2] for name in header.tensors if POOLER in name}
        if sorted(names.values()) == ["bias", "weight"]:
            tensors = read_tensors(path, list(names))
            return {f"classifier_dense.{part}": tensors[name].float() for name, part in names.items()}
    return {}


def check_head(base: Loaded, labels: Labels, n_outputs: int) -> None:
    """Check that the base's head has the size and the labels of the data.

    Raises: ArtifactError showing both.
    """
    config = base.model.config
    same = config.n_labels == n_outputs and config.problem == labels.problem
    if same and (not config.labels or config.labels == labels.names):
        return
    has = f"{config.n_labels} outputs ({config.problem}{': ' + ', '.join(config.labels[:8]) if config.labels else ''})"
    wants = f"{n_outputs} ({labels.problem}{': ' + ', '.join(labels.names[:8]) if labels.names else ''})"
    raise ArtifactError(
        f"the head of `{base.artifact.path}` has {has}, the data needs {wants}",
        "pass the head's labels with --labels, or start from a model without a head",
    )
