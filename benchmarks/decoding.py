"""Decoding speed: llmctl, transformers, llama.cpp and CTranslate2 on one shape in one run, in CPU-seconds.

    python benchmarks/decoding.py --shape 135M [--rows 16 [--ragged]] [--prompt 512] [--threads 2] [--only NAME ...]

All engines run random weights of the same shape: `--rows` prompts of `--prompt` tokens each, or with `--ragged` of an
eighth of that to all of it, then `--tokens` more per row. Reported are tokens per CPU-second of the prompts, of the
tokens after them, and of both together (a program that decodes rows of unequal length at once may read the longer
prompts token by token). Rounds alternate between engines and the minimum counts, since other processes slow a machine
down for seconds at a time; results of different runs are not comparable. llmctl runs twice: with torch only, and (`+`)
with its compiled library. transformers, llama-cpp-python and ctranslate2 run if they are installed; transformers also
with torch.compile over a StaticCache (one row), which takes a minute before the first round. 4 bits: llama.cpp uses
Q4_0 (groups of 32 with a scale), llmctl groups of 32 with scale and zero point. 8 bits: CTranslate2 has a scale per
output and 8-bit activations, as the compiled library has. The head is in 8 bits whenever the blocks are quantized.
"""

import argparse
import ctypes
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from llmctl.benchmarking.compiled_step_check import prepare_library
from llmctl.benchmarking.random_models import random_model, shape_config
from llmctl.config import ModelConfig
from llmctl.inference.session import Session
from llmctl.kernels.compiled_step import find_library
from llmctl.kernels.decoder import make_decoder
from llmctl.machine import processor_name

MOST_ROWS, MOST_TOKENS = 16, 1024
"""The most rows, and tokens of a row, that llama.cpp is given memory for."""

Prompts = Sequence[Sequence[int]]
Engine = Callable[[Prompts, int], tuple[float, float]]
"""Reads the prompts, generates n tokens per prompt, and returns the CPU-seconds of both parts."""


def now() -> float:
    return time.process_time()


def make_prompts(n_rows: int, n_tokens: int, *, ragged: bool) -> Prompts:
    shortest = n_tokens // 8 if ragged else n_tokens
    lengths = [shortest + (n_tokens - shortest) * row // max(1, n_rows - 1) for row in range(n_rows)]
    return [[(7 * position + 3 + row) % 1000 for position in range(length)] for row, length in enumerate(lengths)]


def ours(config: ModelConfig, precision: str, *, compiled: bool) -> Engine:
    os.environ["LLMCTL_NATIVE"] = "1" if compiled else "0"
    model = random_model(config, precision)
    decoder = make_decoder(model)
    assert decoder is not None
    assert compiled == (decoder.native is not None)

    @torch.inference_mode()
    def run(prompts: Prompts, n_tokens: int) -> tuple[float, float]:
        begun = now()
        session = Session(model, prompts, n_tokens + 1, decoder=decoder)
        tokens_B = session.begin().argmax(dim=1)
        read = now()
        for _ in range(n_tokens):
            tokens_B = session.step(tokens_B).argmax(dim=1)
            tokens_B.tolist()
        return read - begun, now() - read

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
    def run(prompts: Prompts, n_tokens: int) -> tuple[float, float]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        is_ragged = bool((mask == 0).any())
        begun = now()
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "logits_to_keep": 1}
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        ragged = {"attention_mask": mask, "position_ids": positions} if is_ragged else {}
        token = model(ids, **ragged, **options).logits[:, -1:].argmax(dim=-1)
        read = now()
        for _ in range(n_tokens):
            if is_ragged:
                mask, positions = torch.cat([mask, mask[:, -1:]], dim=1), positions[:, -1:] + 1
                ragged = {"attention_mask": mask, "position_ids": positions}
            token = model(token, **ragged, **options).logits[:, -1:].argmax(dim=-1)
            token.tolist()
        return read - begun, now() - read

    return run


def transformers_compiled(config: ModelConfig, dtype: torch.dtype) -> Engine:
    from transformers import StaticCache

    model = llama(config, dtype)
    cache = StaticCache(config=model.config, max_cache_len=1024)
    step = torch.compile(
        model.forward, dynamic=False, fullgraph=True, options={"freezing": True}
    )  # the fastest setting tried

    @torch.no_grad()  # compiled and eager code both write the cache in place, which inference tensors do not allow
    def run(prompts: Prompts, n_tokens: int) -> tuple[float, float]:
        cache.reset()
        begun, n_prompt = now(), len(prompts[0])
        token = model(torch.tensor(prompts), past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(dim=-1)
        read = now()
        for position in torch.arange(n_prompt, n_prompt + n_tokens).split(1):
            token = step(token, past_key_values=cache, position_ids=position[None]).logits[:, -1:].argmax(dim=-1)
            token.tolist()
        return read - begun, now() - read

    run([[1, 2, 3]], 2)  # the second call may compile once more
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

    def run(prompts: Prompts, n_tokens: int) -> tuple[float, float]:
        times: list[float] = []
        begun = now()
        generator.generate_batch(
            [[f"<{token}>" for token in prompt] for prompt in prompts],
            max_length=n_tokens + 1,
            min_length=n_tokens + 1,
            include_prompt_in_result=False,
            callback=lambda _: times.append(now()),
        )
        return times[0] - begun, now() - times[0]

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
    parameters.n_ctx, parameters.n_seq_max = MOST_TOKENS * MOST_ROWS, MOST_ROWS
    parameters.n_batch = parameters.n_ubatch = 512
    parameters.n_threads, parameters.n_threads_batch = threads, threads
    context = lib.llama_init_from_model(model, parameters)
    batch = lib.llama_batch_init(512, 0, 1)
    n_vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def feed(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, position, row, whether its logits are wanted), and return the most probable next tokens."""
        batch.n_tokens = len(entries)
        for index, (token, position, row, is_last) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, is_last
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        assert lib.llama_decode(context, batch) == 0
        return [
            int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, index), (n_vocabulary,)).argmax())
            for index, entry in enumerate(entries)
            if entry[3]
        ]

    def run(prompts: Prompts, n_tokens: int) -> tuple[float, float]:
        _ = silent, model  # keep both alive as long as the engine
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        begun = now()
        entries = [
            (token, position, row, position + 1 == len(prompt))
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens = [token for first in range(0, len(entries), 512) for token in feed(entries[first : first + 512])]
        read = now()
        for step in range(n_tokens):
            rows = enumerate(zip(tokens, prompts, strict=True))
            tokens = feed([(token, len(prompt) + step, row, True) for row, (token, prompt) in rows])
        return read - begun, now() - read

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


def engines(config: ModelConfig, threads: int, n_rows: int, folder: Path) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """Yield names and factories of the installed engines; ratios are relative to the first."""
    for precision in ("bf16", "fp32", "int8", "int4"):
        yield precision, lambda p=precision: ours(config, p, compiled=False)
    os.environ.pop("LLMCTL_NATIVE", None)
    prepare_library(lambda text: print(text, file=sys.stderr))
    if find_library() is not None:
        for precision in ("fp32", "bf16", "int8", "int4"):
            yield precision + "+", lambda p=precision: ours(config, p, compiled=True)
    if importlib.util.find_spec("transformers"):
        yield "transformers fp32", lambda: transformers(config, torch.float32)
        yield "transformers bf16", lambda: transformers(config, torch.bfloat16)
        if n_rows == 1:
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = shape_config(arguments.shape)
    prompts = make_prompts(arguments.rows, arguments.prompt, ragged=arguments.ragged)
    n_prompt, n_new = sum(map(len, prompts)), arguments.rows * arguments.tokens
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, make in engines(config, arguments.threads, arguments.rows, Path(folder)):
            if not arguments.only or name in arguments.only:
                print(f"loading {name}", file=sys.stderr, flush=True)
                runners[name] = make()
        best = {name: [float("inf")] * 3 for name in runners}
        for _ in range(arguments.rounds):
            for name, run in runners.items():
                read, written = run(prompts, arguments.tokens)
                best[name] = [min(pair) for pair in zip(best[name], (read, written, read + written), strict=True)]
    what = "unequal prompts" if arguments.ragged else f"prompts of {arguments.prompt} tokens"
    print(f"{processor_name()}, {arguments.shape}, {arguments.threads} threads, {arguments.rows} {what}")
    print("tokens per CPU-second: prompts, after them, both (new tokens only)")
    for name, (read, written, both) in best.items():
        print(f"{name:<20}{n_prompt / read:12,.0f}{n_new / written:12,.1f}{n_new / both:12,.1f}")


if __name__ == "__main__":
    main()
