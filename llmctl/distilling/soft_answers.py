"""Conversations with probabilities that a server gave for the tokens of their answers, as a teacher's outputs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmctl.config import DistillLossConfig, TrainConfig
from llmctl.data.batches import AnswerBatches
from llmctl.data.shards import ShardSet
from llmctl.distilling.objectives import Distillation
from llmctl.model.transformer import LanguageModel
from llmctl.preparing.corpus import Corpus
from llmctl.preparing.examples import SOFT
from llmctl.preparing.soft_targets import N_KEPT, WHOLE
from llmctl.training.batch import Batch
from llmctl.training.objectives import token_bytes_of


class SoftAnswers:
    """The batches of a source with the targets of their labels, in the order of the labels."""

    def __init__(self, source: AnswerBatches, corpus: Corpus) -> None:
        self.source, self.n_rows = source, source.n_rows
        self.ids, self.shares = (corpus.others[name] for name in SOFT)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of the rows with these numbers."""
        found_ids, found = list[NDArray[np.int64]](), list[NDArray[np.float32]]()
        for number in numbers:
            for index in self.source.indexes(number):
                ids = self.source.tokens.document(index).astype(np.int64)[: self.source.max_tokens + 1]
                trained = self.source.trained.document(index).astype(bool)[: len(ids)]
                kept, shares = targets_of(self.ids, self.shares, index, ids)
                found_ids.append(kept[1:][trained[1:]])
                found.append(shares[1:][trained[1:]])
        shares_NK = np.concatenate(found)
        return self.source.batch(numbers) | {
            "teacher_ids": np.concatenate(found_ids),
            "teacher_probs": shares_NK,
            "teacher_tail": np.maximum(0.0, 1.0 - shares_NK.sum(axis=1)).astype(np.float32),
        }


def targets_of(
    ids: ShardSet, shares: ShardSet, index: int, own: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the targets (T, K) of an example; those of one without any are its own tokens."""
    kept = ids.document(index).astype(np.int64)
    if len(kept):
        found = shares.document(index).astype(np.float32).reshape(-1, N_KEPT) / np.float32(WHOLE)
        return kept.reshape(-1, N_KEPT)[: len(own)], found[: len(own)].astype(np.float32)
    alone = np.zeros((len(own), N_KEPT), dtype=np.float32)
    alone[:, 0] = 1.0
    return np.repeat(own[:, None], N_KEPT, axis=1), alone


def soft_prediction(model: LanguageModel, corpus: Corpus, train: TrainConfig) -> Distillation:
    """Return the forward KL divergence from the targets of a batch, over their tokens and one category for all others."""
    loss = DistillLossConfig(name="fkl", temperature=1.0)
    return Distillation(model, (), loss, token_bytes_of(corpus, model.config), chunk_tokens=train.loss_chunk_tokens)


def has_targets(corpus: Corpus) -> bool:
    """Tell whether some examples have targets."""
    return SOFT[0] in corpus.others
