"""Training throughput of llmctl, nanoGPT, LitGPT and transformers: one process, one step of each per round.

    python benchmarks/train.py --shape gpt-10m --nanogpt PATH/model.py --peers DIR
    python benchmarks/train.py --device cuda

All variants train the same sizes on the same random tokens with the same threads, AdamW and gradient clipping. Steps
alternate, so a slowdown of the machine affects all of them; tokens per CPU-second are less sensitive to other load than
tokens per second. Utilization is the model FLOPs (head at predicted positions only) divided by the rate of a plain matrix
product in the same precision, measured in the same run. `--peers` is a folder with the package litgpt (`pip install
--target`); `--nanogpt` is the file model.py of karpathy/nanoGPT. Missing packages are reported and skipped.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.config import ModelConfig, OptimConfig
from llmctl.jobs.estimate import GPU_FLOPS
from llmctl.losses.base import IGNORE
from llmctl.machine import choose_dtype, product_rate
from llmctl.model.flops import row_flops
from llmctl.model.presets import preset_config
from llmctl.model.shapes import complete
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.training.objectives import LabelPrediction
from llmctl.training.optim import make_optimizers

DATA_SHEETS = {"H100": "H100 SXM", "H200": "H100 SXM", "A100": "A100"}
"""Part of a GPU's name -> key of its published FLOP rate; an H200 is an H100 with more memory."""
MASK_FRAC = 0.15
LR, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 0.1
GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu", "gated": False}
SMALL = {"vocab_size": 8192, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1536, "max_positions": 256}


@dataclass(frozen=True)
class Shape:
    """A model config, rows per step, tokens per row, and the fraction of tokens that are predicted."""

    config: ModelConfig
    batch_size: int
    seq_len: int
    label_frac: float = 1.0

    @property
    def n_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def flops(self) -> float:
        """FLOPs of one step, forward and backward."""
        return self.batch_size * row_flops(self.config, self.seq_len, label_frac=self.label_frac)


def shape(batch_size: int, seq_len: int, label_frac: float = 1.0, **fields: Any) -> Shape:
    return Shape(complete(ModelConfig(**fields)), batch_size, seq_len, label_frac)


LLAMA_30M = {"vocab_size": 8192, "d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "d_ff": 1408}
BERT = {name: value for name, value in asdict(preset_config("bert-base")).items() if name not in SMALL}
CPU_SHAPES = {
    "gpt-10m": shape(8, 256, **SMALL, **GPT2),
    "llama-30m": shape(4, 512, **LLAMA_30M, max_positions=512, tie_embeddings=False),
    "bert-10m": shape(8, 256, MASK_FRAC, **SMALL, **{**BERT, "n_kv_heads": 0, "head_dim": 0, "dropout": 0.0}),
}
CUDA_SHAPES = {  # batch size: the largest to try
    "gpt-124m": shape(64, 1024, vocab_size=50_304, d_model=768, n_layers=12, n_heads=12, max_positions=1024, **GPT2),
    "llama-1b": shape(32, 2048, **asdict(preset_config("tinyllama-1.1b"))),
}


@dataclass
class Variant:
    """An implementation to measure; `times` are wall and CPU seconds per step."""

    name: str
    dtype: torch.dtype
    loss: Callable[[dict[str, Tensor]], Tensor]
    parameters: list[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    times: list[tuple[float, float]] = field(default_factory=list)

    def step(self, batch: dict[str, Tensor]) -> None:
        device = batch["labels"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def timed_step(self, batch: dict[str, Tensor]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.step(batch)
        self.times.append((time.perf_counter() - wall, time.process_time() - cpu))


def random_batch(shape: Shape, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    """Return inputs and labels: next tokens, or masked tokens for an encoder."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, shape.config.vocab_size, (shape.batch_size, shape.seq_len + 1), generator=generator)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if shape.config.family == "encoder":
        masked = torch.rand(inputs.shape, generator=generator) < shape.label_frac
        inputs, labels = inputs.masked_fill(masked, 3), inputs.masked_fill(~masked, IGNORE)
    return {"input_ids_BT": inputs.to(device), "labels": labels.to(device)}


def ours(shape: Shape, dtype: torch.dtype, *, compiled: bool = False, device: str = "cpu") -> Variant:
    model = LanguageModel(shape.config)
    initialize(model, 0)
    model.to(device)
    config = OptimConfig(name="adamw", lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY)
    optimizers = list(make_optimizers(model, config).values())
    objective: Any = LabelPrediction(model, torch.ones(shape.config.vocab_size, dtype=torch.int32, device=device), 2048)
    if compiled:
        objective = torch.compile(objective)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        result = objective(batch)
        return result.sum / result.count

    name = f"llmctl {short(dtype)}" + (" compiled" if compiled else "")
    return Variant(name, dtype, loss, list(model.parameters()), optimizers)


def nanogpt(shape: Shape, dtype: torch.dtype, path: Path) -> Variant:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = shape.config
    size = {"block_size": shape.seq_len, "vocab_size": c.vocab_size}
    size |= {"n_layer": c.n_layers, "n_head": c.n_heads, "n_embd": c.d_model}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the number of parameters
        model = module.GPT(module.GPTConfig(**size, dropout=0.0, bias=False))
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, "cpu")
    loss = lambda batch: model(batch["input_ids_BT"], batch["labels"])[1]
    return Variant(f"nanoGPT {short(dtype)}", dtype, loss, list(model.parameters()), [optimizer])


def litgpt(shape: Shape, dtype: torch.dtype) -> Variant:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    c = shape.config
    fields = {"block_size": shape.seq_len, "padded_vocab_size": c.vocab_size, "n_layer": c.n_layers, "bias": False}
    fields |= {"n_head": c.n_heads, "n_query_groups": c.n_kv_heads, "n_embd": c.d_model, "intermediate_size": c.d_ff}
    fields |= {"rotary_percentage": 1.0, "parallel_residual": False}
    if c.gated:
        fields |= {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP"}
    model = GPT(Config(name="benchmark", **fields))
    loss = lambda batch: chunked_cross_entropy(model(batch["input_ids_BT"]), batch["labels"])
    # LitGPT itself uses the fused optimizer only on a GPU.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return Variant(f"LitGPT {short(dtype)}", dtype, loss, list(model.parameters()), [optimizer])


def transformers(shape: Shape, dtype: torch.dtype, *, best: bool) -> Variant:
    import transformers as hf

    hf.logging.set_verbosity_error()
    c, T = shape.config, shape.seq_len
    size = {"vocab_size": c.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layers}
    size |= {"num_attention_heads": c.n_heads, "intermediate_size": c.d_ff, "max_position_embeddings": T}
    model: Any
    if c.family == "encoder":
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = hf.BertForMaskedLM(hf.BertConfig(**size, **no_dropout))
    elif c.gated:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(**size, num_key_value_heads=c.n_kv_heads, tie_word_embeddings=c.tie_embeddings)
        )
    else:
        size = {"vocab_size": c.vocab_size, "n_positions": T, "n_embd": c.d_model}
        size |= {"n_layer": c.n_layers, "n_head": c.n_heads, "n_inner": c.d_ff}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**size, **no_dropout, bos_token_id=None, eos_token_id=None))
    if best:
        model.set_attn_implementation("sdpa")
    model.train()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids_BT"]
        if c.family == "encoder":
            return model(input_ids=ids, labels=batch["labels"]).loss
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # transformers shifts the labels itself

    fused = {"fused": True} if best else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, **fused)
    name = f"transformers {'best' if best else 'default'} {short(dtype)}"
    return Variant(name, dtype, loss, list(model.parameters()), [optimizer])


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def cpu_variants(shape: Shape, nanogpt_path: Path | None) -> Iterable[tuple[str, Callable[[], Variant]]]:
    """Yield names of implementations and functions that build them or raise ImportError."""
    faster = choose_dtype("auto", on_cpu=True)
    is_decoder = shape.config.family == "decoder"
    if is_decoder and not shape.config.gated:
        if nanogpt_path is not None and nanogpt_path.is_file():
            yield "nanoGPT", lambda: nanogpt(shape, torch.float32, nanogpt_path)
        else:
            say(f"nanoGPT is skipped: `--nanogpt {nanogpt_path}` is not a file")
    for dtype in (torch.float32, torch.bfloat16):
        yield "llmctl", lambda dtype=dtype: ours(shape, dtype)
    if is_decoder:
        for dtype in (torch.float32, torch.bfloat16):
            yield "LitGPT", lambda dtype=dtype: litgpt(shape, dtype)
    yield "transformers", lambda: transformers(shape, torch.float32, best=False)
    yield "transformers", lambda: transformers(shape, faster, best=True)


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train all variants of a shape in alternation and return the measurements."""
    shape = CPU_SHAPES[name]
    variants: list[Variant] = []
    missing: set[str] = set()
    for peer, build in cpu_variants(shape, args.nanogpt):
        if peer in missing:
            continue
        torch.manual_seed(0)
        try:
            variants.append(build())
        except ImportError as error:
            missing.add(peer)
            say(f"{peer} is skipped: {error}")
    rates = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    for index in range(args.rounds + 1):
        rates = {dtype: max(rate, product_rate(dtype)) for dtype, rate in rates.items()}
        batch = random_batch(shape, index)
        for variant in variants:
            variant.timed_step(batch)
    rows = [figures(variant, shape, rates[variant.dtype]) for variant in variants]
    base = rows[0]["tokens_per_cpu_second"]
    for row in rows:
        row["ratio"] = row["tokens_per_cpu_second"] / base
    return {
        "shape": name,
        "threads": torch.get_num_threads(),
        "batch_size": shape.batch_size,
        "seq_len": shape.seq_len,
        "rounds": args.rounds,
        "product_flops": {short(dtype): rate for dtype, rate in rates.items()},
        "variants": rows,
    }


def figures(variant: Variant, shape: Shape, rate: float) -> dict[str, Any]:
    """Return the medians of a variant over all steps but the first."""
    wall, cpu = (statistics.median(times) for times in zip(*variant.times[1:], strict=True))
    return {
        "name": variant.name,
        "parameters": sum(parameter.numel() for parameter in variant.parameters),
        "tokens_per_second": shape.n_tokens / wall,
        "tokens_per_cpu_second": shape.n_tokens / cpu,
        "utilization": shape.flops / wall / rate,
    }


def render(result: dict[str, Any]) -> str:
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in result["product_flops"].items())
    size = f"{result['batch_size']} x {result['seq_len']} tokens per step, {result['threads']} threads"
    base = result["variants"][0]["name"]
    lines = [f"{result['shape']}: {size}, median of {result['rounds']} rounds; products: {rates} GFLOP/s"]
    lines += [f"{'':<26}{'parameters':>12}{'tokens/s':>10}{'tokens/CPU-s':>14}{'x ' + base:>26}{'utilization':>13}"]
    for row in result["variants"]:
        speed = f"{row['tokens_per_second']:>10,.0f}{row['tokens_per_cpu_second']:>14,.0f}{row['ratio']:>26.2f}"
        lines += [f"{row['name']:<26}{row['parameters']:>12,}{speed}{row['utilization']:>13.1%}"]
    return "\n".join(lines)


def fits(shape: Shape) -> bool:
    """Return whether a batch fits on this GPU uncompiled; the compiled model needs less memory."""
    try:
        variant = ours(shape, torch.bfloat16, device="cuda")
        for seed in range(2):  # the first step allocates the optimizer state
            variant.step(random_batch(shape, seed, "cuda"))
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def on_gpu(name: str, seconds: float = 40.0) -> dict[str, Any]:
    """Train the compiled model on a GPU with the largest batch that fits, and return the measurements."""
    shape = CUDA_SHAPES[name]
    while shape.batch_size > 1 and not fits(shape):
        shape = replace(shape, batch_size=shape.batch_size // 2)
        gc.collect()
        torch.cuda.empty_cache()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rate = product_rate(torch.bfloat16, "cuda")
    variant = ours(shape, torch.bfloat16, compiled=True, device="cuda")
    for seed in range(3):
        variant.step(random_batch(shape, seed, "cuda"))
    batch = random_batch(shape, 3, "cuda")
    torch.cuda.synchronize()
    begun, n_steps = time.perf_counter(), 0
    while n_steps < 5 or (time.perf_counter() - begun < seconds and n_steps < 100):
        variant.step(batch)
        torch.cuda.synchronize()
        n_steps += 1
    reached = shape.flops * n_steps / (time.perf_counter() - begun)
    gpu = torch.cuda.get_device_name()
    sheet = next((GPU_FLOPS[row] for part, row in DATA_SHEETS.items() if part in gpu), None)
    return {
        "shape": name,
        "device": gpu,
        "name": variant.name,
        "batch_size": shape.batch_size,
        "seq_len": shape.seq_len,
        "steps": n_steps,
        "tokens_per_second": reached / shape.flops * shape.n_tokens,
        "product_flops": rate,
        "utilization": reached / rate,
        "utilization_of_data_sheet": reached / sheet if sheet else None,
        "memory_bytes": torch.cuda.max_memory_allocated(),
    }


def render_gpu(result: dict[str, Any]) -> str:
    sheet = result["utilization_of_data_sheet"]
    parts = [
        f"{result['shape']} on {result['device']}: {result['batch_size']} x {result['seq_len']} tokens per step",
        f"{result['tokens_per_second']:,.0f} tokens/s",
        f"{result['utilization']:.1%} of the measured {result['product_flops'] / 1e12:.0f} TFLOP/s",
        f"{sheet:.1%} of the data sheet's" if sheet else "no data sheet value known",
        f"{result['memory_bytes'] / 2**30:.1f} GiB",
    ]
    return ", ".join(parts)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--shape", action="append", choices=[*CPU_SHAPES, *CUDA_SHAPES], help="default: all shapes of the device"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each variant")
    parser.add_argument("--threads", type=int, default=0, help="0: the default of PyTorch")
    parser.add_argument("--peers", type=Path, help="folder with the package litgpt")
    parser.add_argument("--nanogpt", type=Path, help="model.py of nanoGPT")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    shapes = CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    names = args.shape or list(shapes)
    if unfit := [name for name in names if name not in shapes]:
        parser.error(f"--device {args.device} has the shapes {', '.join(shapes)}, not {', '.join(unfit)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        say("error: `--device cuda`, but PyTorch finds no CUDA device")
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peers:
        sys.path.append(str(args.peers))
    warnings.simplefilter("ignore")  # warnings of the other packages
    for name in names:
        result = on_gpu(name) if args.device == "cuda" else compare(name, args)
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            print(render_gpu(result) if args.device == "cuda" else render(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
