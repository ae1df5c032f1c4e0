"""Evaluate classification heads, and the similarity of text pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llmctl.artifacts.load import Loaded
from llmctl.config import EvaluateConfig
from llmctl.data.examples import Example
from llmctl.data.labels import Labels, read_names
from llmctl.errors import UsageError
from llmctl.evaluating.result import Measured
from llmctl.formats.sentence_encoder import sentence_encoder
from llmctl.inference.encoding import Row, encode_rows, longest_row
from llmctl.inference.rows import row_outputs
from llmctl.metrics import scores


def evaluate_classify(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Measure a classifier: accuracy, F1 and Matthews correlation (correlations for regression), and the loss.

    The loss is the training loss, averaged over rows: cross-entropy; the mean binary cross-entropy for several labels;
    the squared error for regression.
    """
    model = loaded.model.config
    if not model.n_labels:
        raise UsageError(
            f"`{loaded.artifact.path}` has no classification head", "`llmctl finetune --task classify` trains one"
        )
    labels = labels_for(loaded, config)
    targets = torch.tensor([labels.encode(example) for example in examples], dtype=torch.float64)
    rows = _rows(loaded, examples, config)
    outputs_NL = row_outputs(loaded, rows, config.batch_size).double()
    return _measured(examples, rows, label_figures(labels.problem, outputs_NL, targets))


def labels_for(loaded: Loaded, config: EvaluateConfig) -> Labels:
    """Return the labels of a classifier: from the config, else its own, else the output indices.

    Raises: UsageError if the number of labels differs from the number of outputs.
    """
    model = loaded.model.config
    if model.problem == "regression":
        return Labels("regression")
    names = read_names(config.labels) if config.labels else model.labels
    names = names or tuple(map(str, range(model.n_labels)))
    if len(names) != model.n_labels:
        raise UsageError(
            f"`{config.labels}` names {len(names)} labels, `{loaded.artifact.path}` has {model.n_labels}",
            "use the labels the model was trained on",
        )
    return Labels(model.problem, names)


def label_figures(problem: str, outputs_NL: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the metrics of outputs (N, L) against targets (N,), or (N, L) for several labels."""
    if problem == "regression":
        numbers = targets.reshape(len(targets), -1)
        loss = float((outputs_NL - numbers).square().mean())
        return correlations(outputs_NL[:, 0], numbers[:, 0]) | {"loss": loss}
    n_labels = outputs_NL.shape[1]
    if problem == "multi":
        predicted = (outputs_NL > 0).long()
        loss = float(F.binary_cross_entropy_with_logits(outputs_NL, targets))
    else:
        predicted = outputs_NL.argmax(dim=1)
        loss = float(F.cross_entropy(outputs_NL, targets.long()))
    figures = {"accuracy": scores.accuracy(predicted, targets), "f1": scores.f1_score(predicted, targets, n_labels)}
    if problem == "single":
        figures["mcc"] = scores.matthews(predicted, targets)
    return figures | {"loss": loss}


def evaluate_similarity(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Measure how well predicted similarities of text pairs correlate with given scores.

    A model with a regression head encodes both texts together. Any other model encodes each text separately, and the
    similarity is the cosine of their pooled states (Reimers & Gurevych 2019, arXiv:1908.10084).
    """
    model = loaded.model.config
    labels = Labels("regression")
    gold = torch.tensor([labels.encode(example) for example in examples], dtype=torch.float64)
    if model.n_labels:
        if model.problem != "regression" or model.n_labels != 1:
            raise UsageError(
                f"the head of `{loaded.artifact.path}` predicts {model.n_labels} labels, not one number",
                "use `--task classify`",
            )
        rows = _rows(loaded, examples, config)
        predicted = row_outputs(loaded, rows, config.batch_size)[:, 0]
        return _measured(examples, rows, correlations(predicted, gold))
    limit, own = longest_row(loaded, config.seq_len), sentence_encoder(loaded.artifact.files)
    texts = [(own.prompt + example.inputs[role],) for role in ("text", "pair") for example in examples]
    rows = encode_rows(loaded, texts, limit)
    pooling = own.pooling or "mean" if config.pooling == "auto" else config.pooling
    states_ND = row_outputs(loaded, rows, config.batch_size, pooling=pooling).double()
    cosines = F.cosine_similarity(states_ND[: len(examples)], states_ND[len(examples) :])
    return _measured(examples, rows, correlations(cosines, gold))


def correlations(predicted: Tensor, gold: Tensor) -> dict[str, float]:
    """Return the Spearman and Pearson correlation of predictions (N,) and gold scores (N,)."""
    return {"spearman": scores.spearman(predicted, gold), "pearson": scores.pearson(predicted, gold)}


def _rows(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> list[Row]:
    texts = [tuple(example.inputs[role] for role in ("text", "pair") if role in example.inputs) for example in examples]
    return encode_rows(loaded, texts, longest_row(loaded, config.seq_len))


def _measured(examples: Sequence[Example], rows: Sequence[Row], figures: dict[str, float]) -> Measured:
    n_empty = sum(not all(text.strip() for text in example.inputs.values()) for example in examples)
    n_tokens = sum(len(row.ids) for row in rows)
    # Separately encoded pairs are laid out as all first texts, then all second texts.
    cut = {number % len(examples) for number, row in enumerate(rows) if row.n_cut}
    return Measured(figures, len(examples), n_tokens, n_empty, len(cut))
