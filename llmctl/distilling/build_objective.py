"""The objective of a student, from a recipe.

Which objective it is depends on what the teacher predicts: tokens, labels, or hidden states only.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import TaughtConfig
from llmctl.distilling.across_tokenizers import AcrossTokenizers
from llmctl.distilling.label_objective import LabelDistillation
from llmctl.distilling.matching import Matching, StateDistillation
from llmctl.distilling.objectives import Distillation
from llmctl.distilling.on_policy import AnswerWriter, Writer
from llmctl.distilling.teacher import Teachers
from llmctl.inference.chat_ids import end_of_turn_ids
from llmctl.losses.teachers import DenseTeacher
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.examples import chat_of
from llmctl.tables.objectives import OBJECTIVES
from llmctl.tables.tasks import TASKS
from llmctl.training.objectives import Objective, label_prediction, token_bytes_of
from llmctl.training.task_data import TaskData


def matching_of(config: TaughtConfig, data: TaskData, channels: Sequence[int] | None = None) -> Matching:
    """Return what is matched besides predictions; `channels` are the teacher's hidden channels that the student has."""
    loss = config.loss
    is_masked = data.text is not None and OBJECTIVES[data.text.objective].is_masked
    return Matching(
        kind=loss.match,
        weight=loss.match_weight,
        layer=loss.match_layer,
        relation_heads=loss.relation_heads,
        labels_frac=config.data.mask_frac if is_masked else 1.0,
        channels=None if channels is None else torch.tensor(channels),
    )


def build_objective(
    config: TaughtConfig,
    data: TaskData,
    teachers: Teachers,
    model: LanguageModel,
    *,
    channels: Sequence[int] | None = None,
    is_plain: bool = False,
) -> Objective:
    """Return what a model trains on: the teachers' outputs, or only the labels of the data (`is_plain`)."""
    loss, train = config.loss, config.train
    if model.config.n_labels and model.config.head == "text":
        weighted = replace(loss, weight=0.0) if is_plain else loss
        return LabelDistillation(model, teachers.computing, weighted, train.label_smoothing)
    if loss.name == "none":
        return StateDistillation(model, teachers.computing, matching_of(config, data, channels))
    if is_plain:
        return label_prediction(model, data.corpus, train)
    token_bytes, tokenizer = token_bytes_of(data.corpus, model.config), teachers.tokenizer
    if tokenizer is not None and tokenizer.sha256 != data.corpus.tokenizer.sha256:
        return AcrossTokenizers(
            model,
            teachers.computing,
            loss,
            token_bytes,
            (data.corpus.tokenizer, tokenizer),
            chunk_tokens=train.loss_chunk_tokens,
            writer=writer_of(config, data, model),
            ends=ends_of(config, data, teachers),
        )
    return Distillation(
        model,
        teachers.computing,
        loss,
        token_bytes,
        matching=matching_of(config, data, channels),
        chunk_tokens=train.loss_chunk_tokens,
        vocab_size=shared_vocabulary(model, teachers),
        writer=writer_of(config, data, model),
    )


def ends_of(config: TaughtConfig, data: TaskData, teachers: Teachers) -> tuple[int, int] | None:
    """Return the student's and the teacher's token that ends an answer; None where there are no conversations."""
    if not TASKS[config.task].is_chat:
        return None
    teacher = Loaded(teachers.computing[0].model, teachers.tokenizer, teachers.artifact)
    own, other = (sorted(end_of_turn_ids(chat_of(one))) for one in (data.base, teacher))
    return (own[0], other[0]) if own and other else None


def writer_of(config: TaughtConfig, data: TaskData, model: LanguageModel) -> Writer | AnswerWriter | None:
    """Return what generates on-policy batches: the ends of texts, or the answers of conversations."""
    loss = config.loss
    if not loss.on_policy:
        return None
    if not TASKS[config.task].is_chat:
        return Writer(loss.on_policy, loss.on_policy_tokens)
    ends = tuple(sorted(end_of_turn_ids(chat_of(data.base))))
    loaded = Loaded(model, data.corpus.tokenizer, data.base.artifact)
    return AnswerWriter(loss.on_policy, loss.on_policy_tokens, loaded, ends, data.ids(model.config).pad)


def cached_objective(
    config: TaughtConfig, data: TaskData, model: LanguageModel, vocab_size: int, head: DenseTeacher | None
) -> Objective:
    """Return the objective over cached teacher outputs; `head` is the teacher's, for a cache of hidden states."""
    return Distillation(
        model,
        (),
        config.loss,
        token_bytes_of(data.corpus, model.config),
        chunk_tokens=config.train.loss_chunk_tokens,
        vocab_size=min(model.config.vocab_size, vocab_size),
        head=head,
    )


def shared_vocabulary(model: LanguageModel, teachers: Teachers) -> int:
    """Return the rows of the vocabulary that all models have; the rest pads it."""
    return min(model.config.vocab_size, *(teacher.model.config.vocab_size for teacher in teachers.computing))
