"""Tiny random models of published architectures, with the switches of the real ones, made by transformers.

`python -m tests.support.architectures` prints the table of benchmarks/architectures.md.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

LLAMA = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
FULL_HEADS = {"num_key_value_heads": 4}
WINDOWED = ["sliding_attention"] * 3 + ["full_attention"]
GPT = {
    "vocab_size": 384,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
}
ROBERTA = BERT | {"type_vocab_size": 1, "pad_token_id": 1}
DEBERTA = BERT | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
DISTILBERT = {
    "vocab_size": 384,
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 130,
}
T5 = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 384,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
MARIAN = BART | {
    "scale_embedding": True,
    "activation_function": "swish",
    "static_position_embeddings": True,
    "normalize_embedding": False,
}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    """Return the setting of scaled rotary positions."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


class Variant(NamedTuple):
    """A tiny model: the architecture, its settings, and published models that have them."""

    architecture: str
    settings: dict[str, Any]
    models: str
    config: str = ""


def like_llama(architecture: str, models: str, config: str = "", **settings: Any) -> Variant:
    """Return a variant with Llama's settings, changed where named."""
    return Variant(architecture, LLAMA | settings, models, config)


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
VARIANTS: dict[str, Variant] = {
    "llama": like_llama("LlamaForCausalLM", "Llama 2, TinyLlama, SmolLM"),
    "llama-tied": like_llama(
        "LlamaForCausalLM", "SmolLM2 135M, 360M", head_dim=24, **TIED, **rope("default", rope_theta=100000.0)
    ),
    "llama-bias": like_llama("LlamaForCausalLM", "llamafied models with biases", attention_bias=True, mlp_bias=True),
    "llama-3": like_llama(
        "LlamaForCausalLM",
        "Llama 3.1, 3.2, 3.3, DeepSeek-R1-Distill-Llama",
        **TIED,
        **rope(
            "llama3",
            rope_theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-linear": like_llama("LlamaForCausalLM", "vicuna-16k, deepseek-coder-6.7b", **rope("linear", factor=4.0)),
    "llama-yarn": like_llama("LlamaForCausalLM", "long-context Llamas", **YARN),
    "mistral": like_llama("MistralForCausalLM", "Mistral 7B v0.2, v0.3, Nemo", sliding_window=None, head_dim=24),
    "mistral-window": like_llama("MistralForCausalLM", "Mistral 7B v0.1, Zephyr", sliding_window=8),
    "ministral": like_llama(
        "MinistralForCausalLM",
        "Ministral 8B 2410",
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=24,
    ),
    "ministral-3": like_llama("Ministral3ForCausalLM", "Ministral 3 3B, 8B", head_dim=24),
    "qwen2": like_llama("Qwen2ForCausalLM", "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", **TIED),
    "qwen2-window": like_llama(
        "Qwen2ForCausalLM", "Qwen2 with windows", use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
    "qwen3": like_llama("Qwen3ForCausalLM", "Qwen3 0.6B to 8B", head_dim=24, **TIED),
    "qwen3-bare": like_llama("Qwen3Model", "Qwen3-Embedding", head_dim=24, **TIED),
    "qwen3-yarn": like_llama("Qwen3ForCausalLM", "Qwen3 with YaRN", head_dim=24, **YARN),
    "qwen3-moe": like_llama(
        "Qwen3MoeForCausalLM",
        "Qwen3 30B-A3B",
        head_dim=24,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "qwen3.5": like_llama(
        "Qwen3_5ForCausalLM",
        "Qwen3.5 0.8B to 9B",
        "Qwen3_5TextConfig",
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    ),
    "smollm3": like_llama("SmolLM3ForCausalLM", "SmolLM3 3B", no_rope_layers=[1, 1, 1, 0], **TIED),
    "gemma": like_llama("GemmaForCausalLM", "Gemma 2B, 7B", head_dim=24, num_key_value_heads=1, **TIED),
    "gemma2": like_llama(
        "Gemma2ForCausalLM", "Gemma 2 2B, 9B", head_dim=24, sliding_window=8, query_pre_attn_scalar=32, **TIED
    ),
    "gemma3": like_llama(
        "Gemma3ForCausalLM",
        "Gemma 3 270M, 1B",
        "Gemma3TextConfig",
        head_dim=24,
        sliding_window=8,
        query_pre_attn_scalar=32,
        layer_types=WINDOWED,
        **TIED,
    ),
    "gemma3n": like_llama(
        "Gemma3nForCausalLM",
        "Gemma 3n E2B",
        "Gemma3nTextConfig",
        head_dim=24,
        sliding_window=8,
        vocab_size_per_layer_input=384,
        hidden_size_per_layer_input=16,
        layer_types=WINDOWED,
        num_kv_shared_layers=0,
        intermediate_size=[96] * 4,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
        **TIED,
    ),
    "phi": like_llama("PhiForCausalLM", "phi-1, 1.5, 2", partial_rotary_factor=0.5, **FULL_HEADS),
    "phi3": like_llama("Phi3ForCausalLM", "Phi-3-mini-4k, Phi-3.5", sliding_window=8),
    "phi4-mini": like_llama(
        "Phi3ForCausalLM",
        "Phi-4-mini",
        sliding_window=None,
        original_max_position_embeddings=128,
        partial_rotary_factor=0.5,
        **TIED,
        **rope(
            "longrope",
            partial_rotary_factor=0.5,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.5, 2.0, 2.5, 3.0],
            original_max_position_embeddings=128,
        ),
    ),
    "granite": like_llama(
        "GraniteForCausalLM",
        "Granite 3 2B, 8B",
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        logits_scaling=8.0,
        **TIED,
    ),
    "granite-4": like_llama(
        "GraniteMoeHybridForCausalLM",
        "Granite 4.0 350M, 1B",
        shared_intermediate_size=96,
        num_local_experts=0,
        layer_types=["attention"] * 4,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        logits_scaling=8.0,
        position_embedding_type="rope",
        **TIED,
    ),
    "granite-moe": like_llama(
        "GraniteMoeForCausalLM", "Granite 3 1B-A400M", num_local_experts=4, num_experts_per_tok=2
    ),
    "olmo": like_llama("OlmoForCausalLM", "OLMo 1B"),
    "olmo2": like_llama("Olmo2ForCausalLM", "OLMo 2 1B, 7B"),
    "olmo3": like_llama("Olmo3ForCausalLM", "OLMo 3 7B", sliding_window=8, layer_types=WINDOWED),
    "olmoe": like_llama("OlmoeForCausalLM", "OLMoE 1B-7B", num_experts=4, num_experts_per_tok=2),
    "falcon": Variant(
        "FalconForCausalLM",
        {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "Falcon 7B",
    ),
    "falcon-rw": Variant(
        "FalconForCausalLM",
        {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "Falcon RW 1B",
    ),
    "falcon-h1": like_llama(
        "FalconH1ForCausalLM",
        "Falcon-H1 0.5B",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=16,
    ),
    "stablelm": like_llama(
        "StableLmForCausalLM",
        "StableLM 2 1.6B, stable-code",
        partial_rotary_factor=0.25,
        use_qkv_bias=True,
        **FULL_HEADS,
    ),
    "gpt-neox": Variant(
        "GPTNeoXForCausalLM",
        {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "pad_token_id")}
        | {"rotary_pct": 0.25},
        "Pythia 14M to 12B, GPT-NeoX",
    ),
    "gpt-neo": Variant(
        "GPTNeoForCausalLM",
        {
            "vocab_size": 384,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": 512,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "GPT-Neo 125M to 2.7B, TinyStories",
    ),
    "gpt-j": Variant("GPTJForCausalLM", GPT | {"rotary_dim": 8}, "GPT-J 6B"),
    "gpt2": Variant("GPT2LMHeadModel", GPT, "GPT-2, DistilGPT2, DialoGPT, Chinese GPT-2"),
    "gpt-bigcode": Variant("GPTBigCodeForCausalLM", GPT, "StarCoderBase 1B, tiny_starcoder"),
    "starcoder2": like_llama("Starcoder2ForCausalLM", "StarCoder2 3B", sliding_window=8, use_bias=True, **TIED),
    "opt": Variant(
        "OPTForCausalLM",
        {
            "vocab_size": 384,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        "OPT 125M, 1.3B to 6.7B",
    ),
    "bloom": Variant(
        "BloomForCausalLM",
        {"vocab_size": 384, "hidden_size": 64, "n_layer": 4, "n_head": 4}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
        "BLOOM 560M, BLOOMZ",
    ),
    "mpt": Variant(
        "MptForCausalLM", {"vocab_size": 384, "d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 512}, "MPT 7B"
    ),
    "xglm": Variant(
        "XGLMForCausalLM",
        {"vocab_size": 384, "d_model": 64, "ffn_dim": 96, "num_layers": 4, "attention_heads": 4}
        | {"max_position_embeddings": 512},
        "XGLM 564M",
    ),
    "minicpm3": like_llama(
        "MiniCPM3ForCausalLM",
        "MiniCPM3 4B",
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        **FULL_HEADS,
    ),
    "ernie-4.5": like_llama("Ernie4_5ForCausalLM", "ERNIE 4.5 0.3B", head_dim=24, **TIED),
    "lfm2": like_llama(
        "Lfm2ForCausalLM",
        "LFM2 350M to 1.2B",
        block_multiple_of=32,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "lfm3": like_llama("Lfm3ForCausalLM", "LFM3"),
    "hunyuan": like_llama("HunYuanDenseV1ForCausalLM", "Hunyuan 0.5B to 7B", head_dim=24, **TIED),
    "glm4": like_llama("Glm4ForCausalLM", "GLM-4 9B 0414", head_dim=24, partial_rotary_factor=0.5, attention_bias=True),
    "exaone4": like_llama("Exaone4ForCausalLM", "EXAONE 4.0 1.2B", sliding_window=8, layer_types=WINDOWED),
    "cohere2": like_llama("Cohere2ForCausalLM", "Command R7B", sliding_window=8, layer_types=WINDOWED, **TIED),
    "seed-oss": like_llama("SeedOssForCausalLM", "Seed-OSS", head_dim=24),
    "arcee": like_llama("ArceeForCausalLM", "AFM 4.5B"),
    "apertus": like_llama("ApertusForCausalLM", "Apertus 8B"),
    "helium": like_llama("HeliumForCausalLM", "Helium 1 2B", head_dim=16),
    "nemotron": like_llama("NemotronForCausalLM", "Minitron 4B, 8B", partial_rotary_factor=0.5),
    "deepseek-v2": like_llama(
        "DeepseekV2ForCausalLM",
        "DeepSeek-V2-Lite",
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_shared_experts=1,
        **FULL_HEADS,
    ),
    "gpt-oss": like_llama(
        "GptOssForCausalLM",
        "gpt-oss 20B",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mamba2": Variant(
        "Mamba2ForCausalLM",
        {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16}
        | {"state_size": 16, "n_groups": 1, "chunk_size": 16},
        "Mamba 2 130M",
    ),
    "nanochat": like_llama("NanoChatForCausalLM", "nanochat"),
    "modernbert-decoder": like_llama("ModernBertDecoderForCausalLM", "Ettin decoder 17M", local_attention=8),
    "bert": Variant("BertForMaskedLM", BERT, "BERT, Chinese BERT, RoBERTa-wwm-ext"),
    "bert-bare": Variant("BertModel", BERT, "all-MiniLM-L6-v2, BGE, E5, GTE v1"),
    "bert-pretraining": Variant("BertForPreTraining", BERT, "BERT with both heads"),
    "bert-classifier": Variant("BertForSequenceClassification", BERT | {"num_labels": 3}, "cross-encoders"),
    "bert-tokens": Variant("BertForTokenClassification", BERT | {"num_labels": 5}, "bert-base-NER"),
    "bert-answers": Variant("BertForQuestionAnswering", BERT, "BERT on SQuAD"),
    "roberta-tokens": Variant("RobertaForTokenClassification", ROBERTA | {"num_labels": 5}, "CLUENER, roberta NER"),
    "roberta-answers": Variant("RobertaForQuestionAnswering", ROBERTA, "roberta-base-squad2"),
    "xlm-roberta-tokens": Variant("XLMRobertaForTokenClassification", ROBERTA | {"num_labels": 5}, "XLM-R NER"),
    "xlm-roberta-answers": Variant("XLMRobertaForQuestionAnswering", ROBERTA, "xlm-roberta-squad2"),
    "camembert-tokens": Variant("CamembertForTokenClassification", ROBERTA | {"num_labels": 5}, "camembert-ner"),
    "camembert-answers": Variant("CamembertForQuestionAnswering", ROBERTA, "camembert on FQuAD"),
    "distilbert-tokens": Variant("DistilBertForTokenClassification", DISTILBERT | {"num_labels": 5}, "distilbert NER"),
    "distilbert-answers": Variant("DistilBertForQuestionAnswering", DISTILBERT, "distilbert-cased-distilled-squad"),
    "albert-tokens": Variant(
        "AlbertForTokenClassification", BERT | {"embedding_size": 32, "num_labels": 5}, "Chinese ALBERT NER"
    ),
    "albert-answers": Variant("AlbertForQuestionAnswering", BERT | {"embedding_size": 32}, "albert on SQuAD"),
    "electra-tokens": Variant(
        "ElectraForTokenClassification", BERT | {"embedding_size": 32, "num_labels": 5}, "electra NER"
    ),
    "electra-answers": Variant("ElectraForQuestionAnswering", BERT | {"embedding_size": 32}, "electra-squad2"),
    "mpnet-tokens": Variant("MPNetForTokenClassification", BERT | {"pad_token_id": 1, "num_labels": 5}, "mpnet NER"),
    "mpnet-answers": Variant("MPNetForQuestionAnswering", BERT | {"pad_token_id": 1}, "mpnet on SQuAD"),
    "ernie-tokens": Variant("ErnieForTokenClassification", BERT | {"num_labels": 5}, "ERNIE zh NER"),
    "ernie-answers": Variant("ErnieForQuestionAnswering", BERT, "ERNIE zh on DuReader"),
    "megatron-tokens": Variant("MegatronBertForTokenClassification", BERT | {"num_labels": 5}, "Megatron-BERT NER"),
    "megatron-answers": Variant("MegatronBertForQuestionAnswering", BERT, "Megatron-BERT on SQuAD"),
    "modernbert-tokens": Variant(
        "ModernBertForTokenClassification", BERT | {"local_attention": 8, "num_labels": 5}, "ModernBERT NER"
    ),
    "modernbert-tokens-biased": Variant(
        "ModernBertForTokenClassification",
        BERT | {"local_attention": 8, "num_labels": 5, "classifier_bias": True, "norm_bias": True},
        "ModernBERT NER with biases",
    ),
    "modernbert-answers": Variant(
        "ModernBertForQuestionAnswering", BERT | {"local_attention": 8}, "ModernBERT on SQuAD"
    ),
    "eurobert-tokens": like_llama("EuroBertForTokenClassification", "EuroBERT NER", num_labels=5),
    "roberta": Variant("RobertaForMaskedLM", ROBERTA, "RoBERTa, CodeBERT"),
    "roberta-classifier": Variant(
        "RobertaForSequenceClassification", ROBERTA | {"num_labels": 3}, "twitter-roberta-sentiment, BGE rerankers"
    ),
    "xlm-roberta": Variant("XLMRobertaForMaskedLM", ROBERTA, "XLM-R"),
    "xlm-roberta-bare": Variant("XLMRobertaModel", ROBERTA, "multilingual E5, BGE-M3, paraphrase-multilingual"),
    "roberta-bare": Variant("RobertaModel", ROBERTA, "all-distilroberta-v1, SimCSE"),
    "camembert-bare": Variant("CamembertModel", ROBERTA, "sentence-camembert"),
    "distilbert-bare": Variant("DistilBertModel", DISTILBERT, "distiluse, msmarco-distilbert"),
    "mpnet-bare": Variant("MPNetModel", BERT | {"pad_token_id": 1}, "paraphrase-mpnet"),
    "albert-bare": Variant("AlbertModel", BERT | {"embedding_size": 32}, "paraphrase-albert"),
    "ernie-bare": Variant("ErnieModel", BERT, "ERNIE 3.0 zh without head"),
    "modernbert-bare": Variant(
        "ModernBertModel", BERT | {"global_attn_every_n_layers": 3, "local_attention": 8}, "gte-modernbert-base"
    ),
    "electra-generator": Variant("ElectraForMaskedLM", BERT | {"embedding_size": 32}, "ELECTRA generators"),
    "camembert": Variant("CamembertForMaskedLM", ROBERTA, "CamemBERT"),
    "distilbert": Variant("DistilBertForMaskedLM", DISTILBERT, "DistilBERT"),
    "distilbert-classifier": Variant(
        "DistilBertForSequenceClassification", DISTILBERT | {"num_labels": 2}, "DistilBERT on SST-2"
    ),
    "albert": Variant("AlbertForMaskedLM", BERT | {"embedding_size": 32}, "ALBERT base v2"),
    "electra": Variant("ElectraForPreTraining", BERT | {"embedding_size": 32}, "ELECTRA small, base"),
    "deberta-v3": Variant("DebertaV2Model", DEBERTA, "DeBERTa v3 xsmall to large, mDeBERTa v3"),
    "deberta-v3-mlm": Variant("DebertaV2ForMaskedLM", DEBERTA, "DeBERTa v2, v3 with a vocabulary head"),
    "deberta-v3-new-head": Variant(
        "DebertaV2ForMaskedLM", DEBERTA | {"legacy": False}, "DeBERTa v3 as it is published"
    ),
    "deberta-v3-classifier": Variant(
        "DebertaV2ForSequenceClassification", DEBERTA | {"num_labels": 3}, "DeBERTa v3 on MNLI, zero-shot classifiers"
    ),
    "modernbert": Variant(
        "ModernBertForMaskedLM",
        BERT | {"global_attn_every_n_layers": 3, "local_attention": 8},
        "ModernBERT, Ettin, gte-modernbert",
    ),
    "mpnet": Variant("MPNetForMaskedLM", BERT | {"pad_token_id": 1}, "all-mpnet-base-v2, multi-qa-mpnet"),
    "nomic": Variant("NomicBertModel", BERT, "nomic-embed-text v1.5"),
    "eurobert": Variant(
        "EuroBertForMaskedLM",
        BERT | {"num_key_value_heads": 2, "mask_token_id": 3} | rope("default", rope_theta=250000.0),
        "EuroBERT 210M",
    ),
    "ernie": Variant("ErnieForMaskedLM", BERT, "ERNIE 3.0 zh"),
    "jina-v3": Variant("JinaEmbeddingsV3Model", BERT, "jina-embeddings-v3"),
    "gte": Variant("GteModel", BERT, "gte-multilingual-base, Arctic-embed m v2"),
    "roformer": Variant("RoFormerForMaskedLM", BERT, "RoFormer Chinese base"),
    "roformer-bare": Variant("RoFormerModel", BERT, "RoFormer sentence encoders"),
    "roformer-small": Variant("RoFormerForMaskedLM", BERT | {"embedding_size": 32}, "RoFormer Chinese small"),
    "roformer-classifier": Variant(
        "RoFormerForSequenceClassification", BERT | {"embedding_size": 32, "num_labels": 3}, "RoFormer classifiers"
    ),
    "megatron-bert": Variant("MegatronBertForMaskedLM", BERT, "Erlangshen"),
    "t5": Variant("T5ForConditionalGeneration", T5, "T5 small, base"),
    "t5-v1.1": Variant(
        "T5ForConditionalGeneration",
        T5 | {"d_kv": 24, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "Flan-T5, T5 v1.1, ByT5",
    ),
    "t5-encoder": Variant("T5EncoderModel", T5, "sentence-t5, GTR"),
    "mt5": Variant("MT5ForConditionalGeneration", T5, "mT5, mT0"),
    "umt5": Variant("UMT5ForConditionalGeneration", T5, "UMT5"),
    "bart": Variant("BartForConditionalGeneration", BART | {"forced_eos_token_id": 2}, "BART, DistilBART"),
    "bart-scaled": Variant(
        "BartForConditionalGeneration", BART | {"scale_embedding": True, "forced_bos_token_id": 0}, "BART variants"
    ),
    "mbart": Variant("MBartForConditionalGeneration", BART | {"scale_embedding": True}, "mBART 50"),
    "pegasus": Variant("PegasusForConditionalGeneration", BART | {"scale_embedding": True}, "PEGASUS"),
    "marian": Variant(
        "MarianMTModel",
        MARIAN | {"decoder_vocab_size": 384, "decoder_start_token_id": 383, "pad_token_id": 383},
        "opus-mt",
    ),
    "marian-two-vocabularies": Variant(
        "MarianMTModel",
        MARIAN
        | {
            "decoder_vocab_size": 300,
            "decoder_start_token_id": 299,
            "pad_token_id": 299,
            "share_encoder_decoder_embeddings": False,
            "tie_word_embeddings": False,
        },
        "opus-mt-tc-big with two vocabularies",
    ),
    "marian-two-tied": Variant(
        "MarianMTModel",
        MARIAN
        | {
            "decoder_vocab_size": 300,
            "decoder_start_token_id": 299,
            "pad_token_id": 299,
            "share_encoder_decoder_embeddings": False,
        },
        "opus-mt with two vocabularies and a tied head",
    ),
    "m2m": Variant("M2M100ForConditionalGeneration", BART | {"scale_embedding": True}, "NLLB-200, M2M-100"),
    "prophetnet": Variant(
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 384,
            "hidden_size": 64,
            "encoder_ffn_dim": 96,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "decoder_ffn_dim": 96,
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 4,
        },
        "ProphetNet",
    ),
}


def config_class(variant: Variant) -> str:
    """Return the name of transformers' configuration class."""
    if variant.config:
        return variant.config
    name = variant.architecture
    for suffix in ("LMHeadModel", "MTModel", "EncoderModel", "Model"):
        name = name.removesuffix(suffix)
    return re.split("For(?=[A-Z])", name)[0] + "Config"


def build(variant: Variant, folder: Path) -> Any:
    """Write a random model of a variant as transformers does, and return it."""
    import torch
    import transformers

    config = getattr(transformers, config_class(variant))(**variant.settings)
    torch.manual_seed(0)
    model = getattr(transformers, variant.architecture)(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # a table of sinusoids
                continue
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                # Norms and biases too, or an ignored one would not be seen. Gemma's norms are stored minus one.
                is_scale = name.endswith("weight") and "gemma" not in variant.architecture.lower()
                parameter.copy_(is_scale + 0.2 * draw)
            else:
                parameter.copy_(draw * (0.24 if "embed" in name.lower() else 0.12))
    model.tie_weights()
    model.save_pretrained(folder)
    # As it was saved: sinusoids are not stored, so those that were drawn are gone.
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def table() -> str:
    """Return the table of all variants: how far our float32 outputs are from transformers', or why they are not read."""
    import platform
    import tempfile

    import torch
    import transformers

    from llmctl.artifacts.load import load_model
    from llmctl.errors import LlmctlError
    from llmctl.formats.artifact import read_artifact

    rows, n_read, n_through = [], 0, 0
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            model = build(variant, folder)
            try:
                read_artifact(folder)
            except LlmctlError as error:
                reason = str(error).replace(str(folder), "").replace("|", "/")
                reason = (
                    "architecture not read"
                    if variant.architecture in reason.partition("which")[0] and "of the architecture" in reason
                    else reason
                )
                try:
                    through = load_model(folder, device="cpu", dtype="float32", backend="transformers")
                    seen = "packed" if getattr(through.model, "packs", False) else "unpacked"
                    teacher = f"teaches through transformers, {seen}"
                    n_through += 1
                except LlmctlError:
                    teacher = "no teacher"
                rows.append(f"| {variant.architecture} ({name}) | {variant.models} | {reason} | | {teacher} |")
                continue
            found = measure(variant, folder, model)
            n_read += 1
            as_other = "" if found.written == variant.architecture else f" as {found.written}"
            text = "equal" if found.same_text else "DIFFERENT"
            text = "" if found.cached == 0.0 and found.same_text else f"{text}, {found.cached:.0e}"
            rows.append(
                f"| {variant.architecture} ({name}) | {variant.models} | {found.difference:.1e} "
                f"| {found.round_trip:.1e}{as_other} | {text} |"
            )
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, {platform.machine()}"
    counts = f"{n_read} of {len(VARIANTS)} variants are read, {n_through} others teach and are evaluated through "
    counts += f"transformers ({versions}, float32)."
    return "\n".join(
        [
            counts,
            "",
            "| architecture (variant) | models | max. difference | after export | greedy text, cached - uncached |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


class Measured(NamedTuple):
    """How a variant goes through our core.

    difference: largest difference of float32 logits (of states where there is no head) from transformers, whose standard
    deviation is given. cached: of logits with and without a cache, 0 for encoders. written, round_trip: the architecture
    as which the model is written, and transformers' difference before and after. same_text: 12 greedy tokens are equal.
    """

    difference: float
    deviation: float
    cached: float
    written: str
    round_trip: float
    same_text: bool


def outputs(model: Any, ids: Any, decoder_ids: Any) -> Any:
    """Return logits of a transformers model, or the last hidden states where it has no head of ours."""
    import torch

    with torch.no_grad():
        has_decoder = model.config.is_encoder_decoder and "Encoder" not in type(model).__name__
        if type(model).__name__ == "ElectraForPreTraining":
            return model.base_model(input_ids=ids).last_hidden_state
        found = model(input_ids=ids, decoder_input_ids=decoder_ids) if has_decoder else model(input_ids=ids)
    if getattr(found, "start_logits", None) is not None:
        return torch.stack([found.start_logits, found.end_logits], dim=-1)
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    raise AssertionError(type(found))


def measure(variant: Variant, folder: Path, model: Any = None) -> Measured:
    """Compare a variant's model, built in the folder unless given, with ours."""
    import torch
    import transformers

    from llmctl.formats.artifact import read_artifact
    from llmctl.formats.artifact_write import write_artifact
    from llmctl.model.transformer import LanguageModel, load_tensors

    model = build(variant, folder) if model is None else model
    ids = torch.randint(4, 290, (2, 40), generator=torch.Generator().manual_seed(1))
    decoder_ids = torch.randint(4, 290, (2, 15), generator=torch.Generator().manual_seed(2))
    theirs = outputs(model, ids, decoder_ids)
    artifact = read_artifact(folder)
    own = LanguageModel(artifact.config).eval()
    load_tensors(own, artifact.state())
    with torch.no_grad():
        if own.config.n_labels:
            ours = own.classify(ids) if own.config.head == "text" else own.label_tokens(ids)
        elif own.config.family == "encoder_decoder":
            ours = own(ids, decoder_input_ids_BT=decoder_ids)
        else:
            ours = own(ids) if theirs.shape[-1] == own.config.vocab_size else own.hidden(ids)
    written = folder.parent / f"{folder.name}-written"
    write_artifact(written, own.config, own.state_dict(), files={}, provenance={})
    architecture = read_artifact(written).architecture
    again = theirs
    if not architecture.startswith("Llmctl"):
        # A model that was read without its head is compared by its states.
        kind = variant.architecture if theirs.shape[-1] == own.config.d_model and "Electra" not in architecture else ""
        cls = getattr(transformers, kind or architecture)
        again = outputs(cls.from_pretrained(written, dtype=torch.float32).eval(), ids, decoder_ids)
    cached, same_text = decoded(own, model, ids, decoder_ids, variant)
    return Measured(
        (ours - theirs).abs().max().item(),
        theirs.std().item(),
        cached,
        architecture,
        (again - theirs).abs().max().item(),
        same_text,
    )


def decoded(own: Any, model: Any, ids: Any, decoder_ids: Any, variant: Variant) -> tuple[float, bool]:
    """Return the largest difference of logits decoded with a cache, token by token, and whether greedy texts are equal."""
    import torch

    from llmctl.model.cache import KVCache
    from llmctl.model.decode import Decoder, covers

    if (
        own.config.family == "encoder"
        or own.config.n_labels
        or not variant.architecture.endswith(("LM", "Generation", "MTModel", "LMHeadModel"))
    ):
        return 0.0, True
    is_pair = own.config.family == "encoder_decoder"
    tokens = decoder_ids if is_pair else ids
    with torch.inference_mode():
        memory = {"memory_BSD": own.encode(ids)} if is_pair else {}
        whole = own(ids, decoder_input_ids_BT=decoder_ids) if is_pair else own(ids)
        cache = KVCache(own.config, len(tokens), tokens.shape[1], dtype=torch.float32)
        decoder = Decoder(own) if covers(own.config) else None
        steps = []
        for index in range(tokens.shape[1]):
            one = tokens[:, index : index + 1]
            given = memory if index == 0 else ({"memory_BSD": None} if is_pair else {})
            if decoder is not None:
                hidden = decoder.hidden(one, cache, **given)
            elif is_pair:
                hidden = own.decode(one, given["memory_BSD"], cache=cache)
            else:
                hidden = own.hidden(one, cache=cache)
            steps.append(own.head(hidden))
        cached = (torch.cat(steps, 1) - whole).abs().max().item()
        texts = [tokens[:1, :5], tokens[:1, :5]]
        for _ in range(12):
            ours = own(ids[:1], decoder_input_ids_BT=texts[0]) if is_pair else own(texts[0])
            theirs = model(input_ids=ids[:1], decoder_input_ids=texts[1]) if is_pair else model(input_ids=texts[1])
            texts = [
                torch.cat([texts[0], ours[:, -1:].argmax(-1)], 1),
                torch.cat([texts[1], theirs.logits[:, -1:].argmax(-1)], 1),
            ]
    return cached, torch.equal(*texts)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
