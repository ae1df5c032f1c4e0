"""Batches of an objective over the rows of a corpus, and the FLOPs of their positions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmctl.config import ModelConfig, PretrainConfig
from llmctl.data.batches import Batches, CausalBatches, Ids, MaskedBatches, PairBatches, SpanBatches
from llmctl.data.masking import Masking
from llmctl.data.stream import PackedRows, PairRows
from llmctl.model.flops import Rows, Shape, flops_per_token
from llmctl.preparing.corpus import Corpus, Ints
from llmctl.tables.objectives import OBJECTIVES


@dataclass(frozen=True)
class Source:
    """What batches of an objective are made from; `fixed` cuts and masks rows once instead of in every epoch."""

    config: PretrainConfig
    corpus: Corpus
    model: ModelConfig
    shuffle: bool
    fixed: bool = False

    @property
    def ids(self) -> Ids:
        """The ids of special tokens."""
        tokenizer, model = self.corpus.tokenizer, self.model
        return Ids(
            pad=max(model.pad_id, 0),
            eos=max(model.eos_id, 0),
            decoder_start=max(model.decoder_start_id, 0),
            special=tokenizer.token_bytes() == 0,
            sentinels=np.array(tokenizer.sentinel_ids(), dtype=np.int64),
            source_end=tokenizer.frame(model.family).after,
        )

    @property
    def selection(self) -> Ints:
        """The documents of the training or the held-out part."""
        return self.corpus.train if self.shuffle else self.corpus.held_out

    @property
    def mask_seed(self) -> int:
        """The seed of masks: held-out rows have another stream than training rows, the same at every evaluation."""
        return self.config.train.seed * 2 + int(not self.shuffle)

    def packed(self, overlap: int = 0) -> PackedRows:
        """Return documents packed into rows."""
        train = self.config.train
        return PackedRows(
            self.corpus.documents,
            self.selection,
            seq_len=train.seq_len,
            overlap=overlap,
            seed=train.seed,
            shuffle=self.shuffle,
            isolate=self.config.data.isolate,
            fixed=self.fixed,
        )


def causal(source: Source) -> Batches:
    """Return batches whose labels are the next tokens."""
    return CausalBatches(source.packed(overlap=1), source.ids)


def masked(source: Source) -> Batches:
    """Return batches whose labels are masked tokens."""
    data, ids = source.config.data, source.ids
    word_starts = source.corpus.tokenizer.word_starts() if data.whole_word else None
    masking = Masking(max(source.model.mask_id, 0), data.mask_frac, ids.special, word_starts)
    return MaskedBatches(source.packed(), ids, masking, source.mask_seed)


def span(source: Source) -> Batches:
    """Return batches whose targets are spans removed from the source."""
    data = source.config.data
    return SpanBatches(
        source.packed(),
        source.ids,
        frac=data.mask_frac,
        mean_span_tokens=data.mean_span_tokens,
        seed=source.mask_seed,
    )


def pairs(source: Source) -> Batches:
    """Return batches of source and target texts."""
    train, corpus = source.config.train, source.corpus
    assert corpus.targets is not None
    rows = PairRows(
        corpus.documents,
        corpus.targets,
        source.selection,
        seed=train.seed,
        batch_size=train.batch_size,
        shuffle=source.shuffle,
    )
    return PairBatches(rows, source.ids, train.seq_len)


Make = Callable[[Source], Batches]
"""The kind of function that a row of tables/objectives.py names."""


def make_batches(
    config: PretrainConfig, corpus: Corpus, model: ModelConfig, *, shuffle: bool, fixed: bool = False
) -> Batches:
    """Return the objective's batches over the training part, or over the held-out part in order."""
    make: Make = globals()[OBJECTIVES[config.objective].batches]
    return make(Source(config, corpus, model, shuffle, fixed))


def label_flops(config: PretrainConfig, model: ModelConfig) -> float:
    """Return the model's FLOPs per position; 0 for an encoder-decoder, whose two sides differ in length."""
    if model.family == "encoder_decoder":
        return 0.0
    per_token = flops_per_token(model, config.train.seq_len)
    # The head runs only at labeled positions.
    unlabeled = 1 - config.data.mask_frac if OBJECTIVES[config.objective].is_masked else 0.0
    return per_token - 6 * Shape.of(model).head * unlabeled


def rows_of(config: PretrainConfig, shape: ModelConfig) -> Rows:
    """Return the rows of a step for estimates; pairs count as full on both sides, an upper bound."""
    train, data = config.train, config.data
    if shape.family != "encoder_decoder":
        is_encoder = shape.family == "encoder"
        label_frac = data.mask_frac if is_encoder else 1.0
        return Rows(train.batch_size, train.seq_len, label_frac=label_frac, packed=is_encoder or data.isolate)
    source = target = train.seq_len
    if OBJECTIVES[config.objective].needs == "sentinels":
        n_noise = max(1, round(train.seq_len * data.mask_frac))
        n_spans = max(1, round(n_noise / data.mean_span_tokens))
        # Each side has one sentinel per span and an end token.
        source, target = train.seq_len - n_noise + n_spans + 1, n_noise + n_spans + 1
    return Rows(train.batch_size, source, target, packed=True)
