"""Decoding speed of published blocks: the fast decoder and the compiled step against the plain forward pass.

    python benchmarks/blocks.py [--tokens 64] [--rounds 5] [--schemes fp32,int4]

Random weights of one size (width 512, 8 layers, vocabulary 16,000; int4: the head is int8). One row, a prompt of 16 tokens,
greedy. Every round runs all ways one after the other; the figures are tokens per CPU-second, median over the rounds, and
ratios to the plain forward pass with the same cache in the same run.
"""

import argparse
import os
import time
from dataclasses import replace
from statistics import median

import torch

from llmctl.benchmarking.random_models import SHAPES, random_model
from llmctl.config import ModelConfig
from llmctl.inference.session import Session
from llmctl.kernels.compile import compile_library
from llmctl.kernels.compiled_step import load_library, make_native
from llmctl.machine import processor_name
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

LOCAL = 1e4
BLOCKS = {
    "Llama 3": {"rope_scaling": "llama3", "rope_scaling_values": (8.0, 1.0, 4.0, 8192.0), "n_kv_heads": 2},
    "Mistral": {"attention_windows": (1024,), "n_kv_heads": 2},
    "Qwen2, Qwen2.5": {"attention_bias": True, "attention_output_bias": "no", "n_kv_heads": 2},
    "Qwen3": {"qk_norm": True, "n_kv_heads": 2},
    "Gemma 3": {"activation": "gelu_tanh", "norm_position": "both", "qk_norm": True, "n_kv_heads": 2}
    | {"attention_windows": (512,) * 5 + (0,), "rope_thetas": (LOCAL,) * 5 + (1e6,), "embedding_scale": 22.6},
    "Phi-3": {"rotary_dim": 48},
    "OLMo 2": {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width"},
    "GPT-NeoX": {"norm": "layernorm", "gated": False, "attention_bias": True, "mlp_bias": True}
    | {"parallel": "separate", "rotary_dim": 16, "activation": "gelu", "tie_embeddings": False},
    "T5 1.1": {"family": "encoder_decoder", "positions": "relative", "activation": "gelu_tanh", "attention_scale": 1.0},
    "BART": {"family": "encoder_decoder", "positions": "learned", "norm": "layernorm", "norm_position": "post"}
    | {"gated": False, "activation": "gelu", "attention_bias": True, "mlp_bias": True, "embedding_norm": True},
}
PROMPT = 16


def tokens_per_second(model: LanguageModel, decoder: Decoder | None, n_tokens: int) -> float:
    """Return the tokens per CPU-second of greedy decoding."""
    session = Session(model, [list(range(PROMPT))], n_tokens + 1, decoder=decoder)
    token = session.begin().argmax(-1)
    begun = time.process_time()
    for _ in range(n_tokens):
        token = session.step(token).argmax(-1)
    return n_tokens / (time.process_time() - begun)


@torch.inference_mode()
def measure(config: ModelConfig, scheme: str, n_tokens: int, rounds: int) -> dict[str, float]:
    """Return tokens per CPU-second of the plain forward pass, the fast decoder and the compiled step."""
    models = [random_model(config, scheme) for _ in range(3)]
    decoders = [None, *(Decoder(model) for model in models[1:])]
    decoders[2].native = make_native(load_library(compile_library()), decoders[2])
    assert decoders[2].native is not None, "the compiled step does not cover this block"
    speeds: dict[str, list[float]] = {"plain": [], "decoder": [], "compiled": []}
    for number in range(rounds + 1):
        for name, model, decoder in zip(speeds, models, decoders, strict=True):
            speed = tokens_per_second(model, decoder, n_tokens)
            if number:  # the first round warms up
                speeds[name].append(speed)
    return {name: median(values) for name, values in speeds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", default="fp32,int4")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{processor_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print("| block | weights | plain forward pass | fast decoder | compiled step |")
    print("|---|---|--:|--:|--:|")
    base = ModelConfig(**SHAPES["30M"])
    for block, fields in BLOCKS.items():
        for scheme in options.schemes.split(","):
            found = measure(replace(base, **fields), scheme, options.tokens, options.rounds)
            ratios = " | ".join(f"{found[name] / found['plain']:.2f}x" for name in ("decoder", "compiled"))
            print(f"| {block} | {scheme} | {found['plain']:.0f} tokens/CPU-s | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
