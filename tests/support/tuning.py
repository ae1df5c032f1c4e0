"""A tiny random model of every family with a tokenizer, and settings of a run that takes seconds."""

from pathlib import Path

from llmctl.config import ModelConfig, TokenizerConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.tokenizer.train import train_tokenizer

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_positions": 96}
FAMILIES = {
    "decoder": {},
    "encoder": {"family": "encoder"},
    "bert": {
        "family": "encoder",
        "norm": "layernorm",
        "norm_position": "post",
        "embedding_norm": True,
        "positions": "learned",
        "gated": False,
        "activation": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "n_token_types": 2,
    },
    "encoder_decoder": {
        "family": "encoder_decoder",
        "positions": "relative",
        "attention_scale": 1.0,
        "tie_embeddings": False,
        "decoder_start_id": 0,
    },
}
SMALL = [
    "train.batch_size=8",
    "train.steps=12",
    "train.eval_every=6",
    "train.seq_len=64",
    "train.dtype=float32",
    "train.device=cpu",
    "optim.lr=0.005",
    "adapter.rank=4",
]


def write_models(root: Path) -> dict[str, Path]:
    """Write the models and return their folders by family."""
    texts = ["the good cat sat on a bad mat. 猫坐在垫子上。 User: Assistant: what is the number 0123456789?\n"] * 40
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=360, n_sentinels=4))
    paths = {}
    for name, fields in FAMILIES.items():
        ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
        config = ModelConfig(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, **(SHAPE | ids | fields))
        model = LanguageModel(config)
        initialize(model, 1)
        paths[name] = write_artifact(
            root / name, model.config, model.state_dict(), files=tokenizer.files(), provenance={}
        )
    return paths
