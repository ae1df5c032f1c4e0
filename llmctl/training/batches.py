"""Batches of an objective over the rows of a corpus, and the FLOPs of their positions."""

import numpy as np

from llmctl.config import ModelConfig, PretrainConfig
from llmctl.data.batches import Batches, CausalBatches, Ids, MaskedBatches, PairBatches, SpanBatches
from llmctl.data.masking import Masking
from llmctl.data.stream import PackedRows, PairRows
from llmctl.model.flops import Rows, Shape, flops_per_token
from llmctl.preparing.corpus import Corpus


def make_batches(
    config: PretrainConfig, corpus: Corpus, model: ModelConfig, *, shuffle: bool, fixed: bool = False
) -> Batches:
    """Return the objective's batches over the training or the held-out part; `fixed` cuts and masks rows once for all."""
    train, data = config.train, config.data
    tokenizer = corpus.tokenizer
    selection = corpus.train if shuffle else corpus.held_out
    special = tokenizer.token_bytes() == 0
    ids = Ids(
        pad=max(model.pad_id, 0),
        eos=max(model.eos_id, 0),
        decoder_start=max(model.decoder_start_id, 0),
        special=special,
        sentinels=np.array(tokenizer.sentinel_ids(), dtype=np.int64),
    )
    if config.objective == "seq2seq":
        assert corpus.targets is not None
        rows = PairRows(
            corpus.documents, corpus.targets, selection, seed=train.seed, batch_size=train.batch_size, shuffle=shuffle
        )
        return PairBatches(rows, ids, train.seq_len)
    packed = PackedRows(
        corpus.documents,
        selection,
        seq_len=train.seq_len,
        overlap=int(config.objective == "clm"),
        seed=train.seed,
        shuffle=shuffle,
        isolate=data.isolate,
        fixed=fixed,
    )
    if config.objective == "clm":
        return CausalBatches(packed, ids)
    # Held-out rows are masked by another stream than training rows, the same at every evaluation.
    seed = train.seed * 2 + int(not shuffle)
    if config.objective == "span":
        return SpanBatches(packed, ids, frac=data.mask_frac, mean_span_tokens=data.mean_span_tokens, seed=seed)
    word_starts = tokenizer.word_starts() if data.whole_word else None
    return MaskedBatches(packed, ids, Masking(max(model.mask_id, 0), data.mask_frac, special, word_starts), seed)


def label_flops(config: PretrainConfig, model: ModelConfig) -> float:
    """Return the model's FLOPs per position of a row; 0 for an encoder-decoder, whose two sides differ in length."""
    if model.family == "encoder_decoder":
        return 0.0
    per_token = flops_per_token(model, config.train.seq_len)
    # The head works where labels are, and nowhere else.
    unlabeled = 1 - config.data.mask_frac if config.objective == "mlm" else 0.0
    return per_token - 6 * Shape.of(model).head * unlabeled


def rows_of(config: PretrainConfig, shape: ModelConfig) -> Rows:
    """Return the rows of a step; those of pairs are taken as full on both sides, which real ones are at most."""
    train, data = config.train, config.data
    if shape.family != "encoder_decoder":
        is_encoder = shape.family == "encoder"
        label_frac = data.mask_frac if is_encoder else 1.0
        return Rows(train.batch_size, train.seq_len, label_frac=label_frac, packed=is_encoder or data.isolate)
    source = target = train.seq_len
    if config.objective == "span":
        n_noise = max(1, round(train.seq_len * data.mask_frac))
        n_spans = max(1, round(n_noise / data.mean_span_tokens))
        # Either side has a sentinel per span and ends with its end-of-text token.
        source, target = train.seq_len - n_noise + n_spans + 1, n_noise + n_spans + 1
    return Rows(train.batch_size, source, target, packed=True)
