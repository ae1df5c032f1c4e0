"""How many FLOP/s a small model reaches in a real optimizer step: far fewer than a large matrix product does."""

import time

import torch

from llmctl.config import ModelConfig, PretrainConfig
from llmctl.model.flops import row_flops
from llmctl.model.parameters import count
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.training import optim
from llmctl.training.objectives import LabelPrediction

PROBE_SECONDS = 1.0
"""A step that would take longer even at the rate of a matrix product is not tried: at that size the two are close."""

MOST_PARAMETERS = 50_000_000
"""Larger models are not built for a measurement."""


def step_rate(config: PretrainConfig, shape: ModelConfig, product_rate: float, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a step of a decoder of this width and depth, or `product_rate` for a large model.

    Two steps on random tokens; the first one warms up.
    """
    rows, length = config.train.batch_size, config.train.seq_len
    plain = ModelConfig(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        max_positions=length,
    )
    flops = rows * row_flops(plain, length)
    if flops / product_rate > PROBE_SECONDS or count(plain) > MOST_PARAMETERS:
        return product_rate
    torch.manual_seed(0)
    model = LanguageModel(plain)
    initialize(model, 0)
    model.to(dtype)
    objective = LabelPrediction(model, torch.ones(plain.vocab_size, dtype=torch.int32), config.train.loss_chunk_tokens)
    optimizers = optim.make_optimizers(model, config.optim, dtype)
    ids = torch.randint(0, plain.vocab_size, (rows, length))
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        objective({"input_ids_BT": ids, "labels": ids}).sum.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begun
    return min(product_rate, flops / seconds)
