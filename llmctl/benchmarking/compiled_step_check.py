"""Compile the decoding step and try it: against the same models decoded by torch, before anything uses it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmctl.benchmarking.random_models import random_model
from llmctl.config import ModelConfig
from llmctl.errors import LlmctlError
from llmctl.kernels.compile import Library, compile_library
from llmctl.kernels.compiled_step import load_library, make_native
from llmctl.model.cache import CACHES
from llmctl.model.decode import Decoder
from llmctl.quant.schemes import GROUPS, SCHEMES

SHAPE = ModelConfig(
    vocab_size=96,
    d_model=128,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=256,
    max_positions=64,
    attention_windows=(0, 5),
)
LARGEST_ERRORS: Mapping[str, float] = {
    "fp32": 1e-4,
    "bf16": 0.02,
    "int8": 0.03,
    "int4": 0.03,
    "int4-sym": 0.03,
    **dict.fromkeys(("int3", "int5", "int6"), 0.05),
    "fp32/int8": 0.01,
}
"""Of the logits, in the norm, by precision, or precision/how keys and values are held.

Activations are float32 in the compiled step, which in bfloat16 torch rounds; a key in 8 bits may fall to either side.
"""

N_TOKENS = 10


def compile_and_check() -> Path:
    """Compile the step, try it, and return its file; one that is wrong is removed.

    Raises: MissingCompilerError, LlmctlError saying what went wrong.
    """
    path = compile_library()
    problem = ""
    try:
        errors = errors_of(load_library(path))
        wrong = [f"{name} by {error:.2g}" for name, error in errors.items() if not error < LARGEST_ERRORS[name]]
        problem = f"its logits are off ({', '.join(wrong)})" if wrong else ""
    except (OSError, AttributeError) as error:
        problem = str(error)
    if problem:
        path.unlink(missing_ok=True)
        raise LlmctlError(f"the compiled decoding step is not used: {problem}", "generation works without it")
    return path


def errors_of(library: Library) -> dict[str, float]:
    """Return the relative error of the compiled step after some tokens of three rows, as `LARGEST_ERRORS`."""
    return {held: max(error_of(library, held, group) for group in groups_of(held)) for held in LARGEST_ERRORS}


def groups_of(held: str) -> tuple[int, ...]:
    """Return the sizes of groups that are tried of what is held so; 0 is the only one of what has none."""
    return GROUPS if held in SCHEMES and SCHEMES[held].group else (0,)


@torch.inference_mode()
def error_of(library: Library, held: str, group: int = 0, **fields: Any) -> float:
    """Return the relative error of the logits of a small model; `held` as in `LARGEST_ERRORS`; group: 0 is the scheme's."""
    precision, _, kv = held.partition("/")
    decoder = Decoder(random_model(replace(SHAPE, **fields), precision, group=group))
    step = make_native(library, decoder)
    if step is None:
        return float("inf")
    dtype = next(decoder.model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(0, SHAPE.vocab_size, (3, 7), generator=generator)
    caches = [CACHES[kv or "float"](decoder.config, 3, 7 + N_TOKENS, dtype=dtype) for _ in range(2)]
    for cache in caches:
        decoder.hidden(prompt_BT, cache)
    errors = []
    for _ in range(N_TOKENS):
        tokens_B = torch.randint(0, SHAPE.vocab_size, (3,), generator=generator)
        expected_BV, found_BV = decoder.logits(tokens_B, caches[0]).float(), step(tokens_B, caches[1])
        assert found_BV is not None
        errors.append((found_BV - expected_BV).norm() / expected_BV.norm())
    return float(torch.stack(errors).max())
