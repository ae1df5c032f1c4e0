"""What a key of config.json means where it is absent: transformers' default of each model type.

The rows of a family have defaults for what its files leave out; here are those that differ among the families which share
a row. Null is not absent: a file that says so has no such token. Compared with transformers in tests/interop.
"""

from collections.abc import Mapping
from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
    "ministral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "smollm3": {
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
    },
    "gemma": {"num_key_value_heads": 16, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    "gemma2": {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    "gemma3_text": {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    "phi": {"bos_token_id": 1, "eos_token_id": 2},
    "phi3": {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000},
    "granite": {"bos_token_id": 1, "eos_token_id": 2},
    "granitemoehybrid": {
        "num_local_experts": 8,
        "position_embedding_type": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "olmo": {"eos_token_id": 50279, "pad_token_id": 1},
    "olmo2": {"eos_token_id": 50279, "pad_token_id": 1},
    "olmo3": {"eos_token_id": 50279, "pad_token_id": 1},
    "falcon": {"bos_token_id": 11, "eos_token_id": 11},
    "stablelm": {"max_position_embeddings": 4096, "num_key_value_heads": 32, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {"bos_token_id": 0, "eos_token_id": 2},
    "gpt_neo": {"bos_token_id": 50256, "eos_token_id": 50256},
    "gptj": {"bos_token_id": 50256, "eos_token_id": 50256},
    "gpt2": {"bos_token_id": 50256, "eos_token_id": 50256},
    "gpt_bigcode": {"bos_token_id": 50256, "eos_token_id": 50256},
    "starcoder2": {
        "initializer_range": 0.018042,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    "opt": {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    "bloom": {"bos_token_id": 1, "eos_token_id": 2},
    "xglm": {"bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    "ernie4_5": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "hunyuan_v1_dense": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "glm4": {
        "attention_bias": True,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "eos_token_id": 151329,
        "pad_token_id": 151329,
    },
    "exaone4": {"num_key_value_heads": 32, "bos_token_id": 0, "eos_token_id": 2},
    "cohere2": {"bos_token_id": 5, "eos_token_id": 255001, "pad_token_id": 0},
    "seed_oss": {
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "arcee": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "bos_token_id": 128000, "eos_token_id": 128001},
    "helium": {
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 20,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    },
    "nemotron": {"initializer_range": 0.0134, "max_position_embeddings": 4096, "bos_token_id": 2, "eos_token_id": 3},
    "bert": {"intermediate_size": 3072, "pad_token_id": 0},
    "roberta": {"intermediate_size": 3072, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "xlm-roberta": {"intermediate_size": 3072, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "camembert": {"intermediate_size": 3072, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "distilbert": {"hidden_dim": 3072, "pad_token_id": 0},
    "mpnet": {"intermediate_size": 3072, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "albert": {
        "hidden_dropout_prob": 0.0,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_attention_heads": 64,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    },
    "ernie": {"intermediate_size": 3072, "pad_token_id": 0},
    "modernbert": {"bos_token_id": 50281, "eos_token_id": 50282, "pad_token_id": 50283},
    "deberta-v2": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_attention_heads": 24,
        "num_hidden_layers": 24,
        "type_vocab_size": 0,
        "relative_attention": False,
        "position_biased_input": True,
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "pad_token_id": 0,
    },
    "roformer": {"intermediate_size": 3072, "pad_token_id": 0},
    "electra": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "pad_token_id": 0},
    "nomic_bert": {"max_position_embeddings": 2048, "pad_token_id": 0},
    "eurobert": {
        "max_position_embeddings": 8192,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "mask_token_id": 128002,
        "pad_token_id": 128001,
    },
    "jina_embeddings_v3": {
        "hidden_dropout_prob": 0.1,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "max_position_embeddings": 8194,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "gte": {"hidden_dropout_prob": 0.1, "pad_token_id": 1},
    "megatron-bert": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 0,
    },
    "t5": {"eos_token_id": 1, "pad_token_id": 0},
    "mt5": {
        "d_ff": 1024,
        "feed_forward_proj": "gated-gelu",
        "num_heads": 6,
        "num_layers": 8,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "umt5": {
        "d_ff": 1024,
        "feed_forward_proj": "gated-gelu",
        "num_heads": 6,
        "num_layers": 8,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
    "bart": {"bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
    "mbart": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "pegasus": {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
    "marian": {"decoder_start_token_id": 58100, "eos_token_id": 0, "pad_token_id": 58100},
    "m2m_100": {
        "scale_embedding": True,
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
}
"""Keys and values by `model_type`. A token beyond a small vocabulary is none."""


def with_defaults(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json with those that its type has where they are absent."""
    size = values.get("vocab_size")
    defaults = {
        key: value
        for key, value in DEFAULTS.get(model_type, {}).items()
        if not key.endswith("_token_id") or type(size) is not int or value < size
    }
    return defaults | dict(values)
