"""Speed of a model on this machine: forward passes over a batch, and decoding token by token."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmctl.inference.session import Session
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

TIMINGS, MOST_SECONDS = 5, 2.0
"""Timed forward passes, whose median counts: fewer, but at least one, where they take longer in all."""

PROMPT_TOKENS, NEW_TOKENS = 16, 32
"""Prompt length and number of new tokens for timing decoding."""


@torch.inference_mode()
def reading_speed(model: LanguageModel, batch: Mapping[str, Tensor]) -> float:
    """Return the tokens per second of forward passes over a batch, without the head."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}
    ids = inputs.get("decoder_input_ids_BT", inputs["input_ids_BT"])
    was_training = model.training
    model.eval()
    seconds: list[float] = []  # the first warms up
    while len(seconds) < 2 or (len(seconds) <= TIMINGS and sum(seconds) < MOST_SECONDS):
        seconds.append(timed(lambda: model.hidden(**inputs), ids.device))
    model.train(was_training)
    return float(ids.numel() / median(seconds[1:]))


@torch.inference_mode()
def writing_speed(model: LanguageModel, batch: Mapping[str, Tensor], decoder: Decoder | None) -> float | None:
    """Return the tokens per second of decoding at batch size 1; None for a model that cannot generate."""
    if model.config.family == "encoder" or model.config.n_labels:
        return None
    was_training = model.training
    model.eval()
    n_new = min(NEW_TOKENS, model.config.max_positions - PROMPT_TOKENS)
    if n_new < 2:
        return None
    prompt = batch["input_ids_BT"][0, :PROMPT_TOKENS].tolist()
    session = Session(model, [prompt], n_new, decoder=decoder)
    tokens_B = session.begin().argmax(dim=1)
    seconds = []
    for _ in range(n_new - 1):
        begun = time.perf_counter()
        tokens_B = session.step(tokens_B).argmax(dim=1)
        seconds.append(time.perf_counter() - begun)
    model.train(was_training)
    return 1 / median(seconds)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that `work` takes, synchronized on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
