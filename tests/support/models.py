"""Tiny random models of every kind, with a tokenizer where text is needed."""

from collections.abc import Callable

import pytest
import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.formats.artifact import Artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer
from llmctl.tokenizer.train import train_tokenizer

KINDS: dict[str, dict] = {
    "rope": {},
    "gqa-qk": {"n_kv_heads": 2, "qk_norm": True},
    "learned": {"positions": "learned", "norm": "layernorm", "gated": False, "activation": "gelu"},
    "sinusoidal-post": {"positions": "sinusoidal", "norm_position": "post"},
    "windows": {"attention_windows": (0, 4)},
    "query-layer": {"positions": "learned", "query_layer": True},
    "relative": {"positions": "relative"},
    "t5": {"family": "encoder_decoder", "positions": "relative", "attention_scale": 1.0, "tie_embeddings": False},
    "bart": {
        "family": "encoder_decoder",
        "positions": "learned",
        "norm": "layernorm",
        "attention_bias": True,
        "mlp_bias": True,
        "gated": False,
    },
    "marian": {"family": "encoder_decoder", "positions": "sinusoidal", "norm_position": "post", "norm": "layernorm"},
}


@pytest.fixture(scope="session")
def text_tokenizer() -> SentencePieceTokenizer:
    return train_tokenizer(["a list of strings 中文，诗。 \n"] * 20, TokenizerConfig(vocab_size=330, n_sentinels=4))


@pytest.fixture
def make_loaded(text_tokenizer, tmp_path) -> Callable[..., Loaded]:
    """Return a maker of loaded models whose output is varied: weights are drawn wide."""

    def make(kind: str, *, seed: int = 0, tokenizer: bool = True, is_own: bool = True, **fields) -> Loaded:
        settings = {
            "vocab_size": text_tokenizer.vocab_size,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_positions": 48,
            "init_std": 0.4,
            "bos_id": 2,
            "eos_id": 3,
            "pad_id": 0,
            "decoder_start_id": 0,
        }
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(**(settings | KINDS[kind] | fields)))
        initialize(model, seed)
        artifact = Artifact(tmp_path, "", model.config, {}, {})
        return Loaded(model.eval(), text_tokenizer if tokenizer else None, artifact, is_own=is_own)

    return make
