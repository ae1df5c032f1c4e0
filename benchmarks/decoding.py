"""Decoding speed at batch size 1: llmctl, transformers, llama.cpp and CTranslate2 on one shape in one run.

    python benchmarks/decoding.py --shape 135M --threads 2 [--rounds 6] [--only NAME ...]

All engines run random weights of the same shape after a prompt of 64 tokens. Rounds alternate between engines and the
best round counts: other processes slow a machine down for seconds at a time, so results of different runs are not
comparable. llmctl runs twice: with torch only, and (`+`) with the step that `llmctl doctor --compile` compiles.
transformers, llama-cpp-python and ctranslate2 run if they are installed; transformers also with torch.compile over a
StaticCache, which takes a minute before the first round. 4 bits: llama.cpp uses Q4_0 (groups of 32 with a scale), llmctl
groups of 32 with scale and zero point. 8 bits: CTranslate2 has a scale per output and 8-bit activations, as the compiled
step has. The head is in 8 bits whenever the blocks are quantized.
"""

import argparse
import ctypes
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from llmctl.benchmarking.random_models import random_model, shape_config
from llmctl.config import ModelConfig
from llmctl.errors import LlmctlError
from llmctl.inference.session import Session
from llmctl.kernels.compile import compile_library
from llmctl.kernels.compiled_step import load_library, make_native
from llmctl.kernels.decoder import make_decoder

PROMPT = [(7 * position + 3) % 1000 for position in range(64)]
Engine = Callable[[int], float]
"""Processes the prompt, generates n tokens, and returns the seconds per token."""


def ours(config: ModelConfig, precision: str, *, compiled: bool) -> Engine:
    model = random_model(config, precision)
    decoder = make_decoder(model)
    assert decoder is not None
    decoder.native = make_native(load_library(compile_library()), decoder) if compiled else None
    assert compiled == (decoder.native is not None)

    @torch.inference_mode()
    def run(n_tokens: int) -> float:
        session = Session(model, [PROMPT], n_tokens + 1, decoder=decoder)
        tokens_B = session.begin().argmax(dim=1)
        begun = time.perf_counter()
        for _ in range(n_tokens):
            tokens_B = session.step(tokens_B).argmax(dim=1)
            tokens_B.tolist()
        return (time.perf_counter() - begun) / n_tokens

    return run


def llama(config: ModelConfig, dtype: torch.dtype):
    """Return a transformers model of this shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads or config.n_heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
    )
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(shape).eval()
    torch.set_default_dtype(torch.float32)
    return model


def transformers(config: ModelConfig, dtype: torch.dtype) -> Engine:
    from transformers import DynamicCache

    model = llama(config, dtype)

    @torch.inference_mode()
    def run(n_tokens: int) -> float:
        cache = DynamicCache(config=model.config)
        token = model(torch.tensor([PROMPT]), past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        begun = time.perf_counter()
        for _ in range(n_tokens):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
            token.tolist()
        return (time.perf_counter() - begun) / n_tokens

    return run


def transformers_compiled(config: ModelConfig, dtype: torch.dtype) -> Engine:
    from transformers import StaticCache

    model = llama(config, dtype)
    cache = StaticCache(config=model.config, max_cache_len=256)
    step = torch.compile(
        model.forward, dynamic=False, fullgraph=True, options={"freezing": True}
    )  # the fastest setting tried

    @torch.no_grad()  # compiled and eager code both write the cache in place, which inference tensors do not allow
    def run(n_tokens: int) -> float:
        cache.reset()
        token = model(torch.tensor([PROMPT]), past_key_values=cache).logits[:, -1:].argmax(dim=-1)
        positions = torch.arange(len(PROMPT), len(PROMPT) + n_tokens).split(1)
        begun = time.perf_counter()
        for position in positions:
            token = step(token, past_key_values=cache, position_ids=position[None]).logits[:, -1:].argmax(dim=-1)
            token.tolist()
        return (time.perf_counter() - begun) / n_tokens

    run(2)  # the second call may compile once more
    return run


def ctranslate2(config: ModelConfig, kind: str, threads: int, folder: Path) -> Engine:
    """Return CTranslate2 on a converted transformers model."""
    import ctranslate2 as lib
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{token}>": token for token in range(config.vocab_size)}
    source, target = folder / "source", folder / f"ctranslate2-{kind}"
    if not source.exists():
        llama(config, torch.float32).save_pretrained(source)
        marks = {"unk_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), **marks
        )
        tokenizer.save_pretrained(source)
    lib.converters.TransformersConverter(str(source)).convert(str(target), quantization=kind)
    generator = lib.Generator(str(target), device="cpu", compute_type=kind, intra_threads=threads, inter_threads=1)
    prompt = [f"<{token}>" for token in PROMPT]

    def run(n_tokens: int) -> float:
        times: list[float] = []
        generator.generate_batch(
            [prompt],
            max_length=n_tokens + 1,
            min_length=n_tokens + 1,
            include_prompt_in_result=False,
            callback=lambda _: times.append(time.perf_counter()),
        )
        assert len(times) == n_tokens + 1
        return (times[-1] - times[0]) / n_tokens

    return run


def llama_cpp(config: ModelConfig, kind: str, threads: int, folder: Path) -> Engine:
    import llama_cpp as lib

    path = folder / f"{kind}.gguf"
    write_gguf(path, config, kind)
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    parameters = lib.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 512, threads, threads
    context = lib.llama_init_from_model(model, parameters)
    n_vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def feed(tokens: list[int]) -> int:
        array = (lib.llama_token * len(tokens))(*tokens)
        assert lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))) == 0
        return int(np.ctypeslib.as_array(lib.llama_get_logits(context), (n_vocabulary,)).argmax())

    def run(n_tokens: int) -> float:
        _ = silent, model  # keep both alive as long as the engine
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        token = feed(PROMPT)
        begun = time.perf_counter()
        for _ in range(n_tokens):
            token = feed([token])
        return (time.perf_counter() - begun) / n_tokens

    return run


def write_gguf(path: Path, config: ModelConfig, kind: str) -> None:
    """Write a GGUF model with random quantized blocks."""
    import gguf

    types = gguf.GGMLQuantizationType
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads or config.n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config.d_model // config.n_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, n_out: int, n_in: int, what: str = kind) -> None:
        if what == "BF16":
            numbers = (generator.standard_normal((n_out, n_in), dtype=np.float32) * 0.02).view(np.uint32) >> 16
            return writer.add_tensor(name, numbers.astype(np.uint16).view(np.uint8), raw_dtype=types.BF16)
        size, scale = {"Q4_0": (16, 0.004), "Q8_0": (32, 0.0003)}[what]
        blocks = generator.integers(0, 256, (n_out, n_in // 32, 2 + size), dtype=np.uint8)
        blocks[..., :2] = np.array([scale], dtype=np.float16).view(np.uint8)
        return writer.add_tensor(name, blocks.reshape(n_out, -1), raw_dtype=types[what])

    width, kv_width = config.d_model, config.d_model // config.n_heads * (config.n_kv_heads or config.n_heads)
    head = "BF16" if kind == "BF16" else "Q8_0"
    add("token_embd.weight", config.vocab_size, width, head)
    add("output.weight", config.vocab_size, width, head)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(config.n_layers):
        start = f"blk.{layer}."
        writer.add_tensor(start + "attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(start + "ffn_norm.weight", np.ones(width, np.float32))
        for name, n_out, n_in in (
            ("attn_q", width, width),
            ("attn_k", kv_width, width),
            ("attn_v", kv_width, width),
            ("attn_output", width, width),
            ("ffn_gate", config.d_ff, width),
            ("ffn_up", config.d_ff, width),
            ("ffn_down", width, config.d_ff),
        ):
            add(f"{start}{name}.weight", n_out, n_in)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def engines(config: ModelConfig, threads: int, folder: Path) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """Yield names and factories of the installed engines; ratios are relative to the first."""
    yield "bf16", lambda: ours(config, "bf16", compiled=False)
    for precision in ("fp32", "int8", "int4"):
        yield precision, lambda p=precision: ours(config, p, compiled=False)
    try:
        compile_library()
        for precision in ("fp32", "bf16", "int8", "int4"):
            yield precision + "+", lambda p=precision: ours(config, p, compiled=True)
    except LlmctlError as error:
        print(f"no compiled step: {error}", file=sys.stderr)
    if importlib.util.find_spec("transformers"):
        yield "transformers fp32", lambda: transformers(config, torch.float32)
        yield "transformers bf16", lambda: transformers(config, torch.bfloat16)
        yield "compiled fp32", lambda: transformers_compiled(config, torch.float32)
        yield "compiled bf16", lambda: transformers_compiled(config, torch.bfloat16)
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("ctranslate2"):
        from ctranslate2 import get_supported_compute_types

        for kind in sorted({"float32", "bfloat16", "int8"} & get_supported_compute_types("cpu")):
            yield f"CTranslate2 {kind}", lambda k=kind: ctranslate2(config, k, threads, folder)
    if importlib.util.find_spec("llama_cpp"):
        for kind in ("BF16", "Q8_0", "Q4_0"):
            yield f"llama.cpp {kind}", lambda k=kind: llama_cpp(config, k, threads, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = shape_config(arguments.shape)
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, make in engines(config, arguments.threads, Path(folder)):
            if not arguments.only or name in arguments.only:
                print(f"loading {name}", file=sys.stderr, flush=True)
                runners[name] = make()
        best = dict.fromkeys(runners, float("inf"))
        for _ in range(arguments.rounds):
            for name, run in runners.items():
                best[name] = min(best[name], run(arguments.tokens))
    print(f"{arguments.shape}, {arguments.threads} threads, batch 1")
    first = next(iter(best.values()))
    for name, seconds in best.items():
        print(f"{name:<20}{1000 * seconds:8.2f} ms/token{1 / seconds:9.1f} tokens/s{first / seconds:7.2f}")


if __name__ == "__main__":
    main()
