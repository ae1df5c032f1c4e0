"""Tiny models whose every weight is random, norms and biases too, so that a forgotten one shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]


@pytest.fixture
def build() -> Build:
    """Return a function from fields of ModelConfig to a float64 model in evaluation mode."""

    def make(*, seed: int = 0, **fields: Any) -> LanguageModel:
        small = {"vocab_size": 29, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24, "max_positions": 40}
        model = LanguageModel(ModelConfig(**{**small, **fields})).double().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.4, generator=generator)
        return model

    return make


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Return a function from a shape to random token ids of the tiny vocabulary."""

    def draw(*shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(0, 29, shape, generator=torch.Generator().manual_seed(seed))

    return draw
