"""Check the decoding library against torch on small models, once per machine, and compile it where there is none."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmctl.benchmarking.random_models import random_model
from llmctl.config import ModelConfig
from llmctl.errors import LlmctlError, OutputError
from llmctl.kernels.build import BuildError, find_compiler
from llmctl.kernels.compile import (
    COMPILED,
    PACKAGED,
    Library,
    check_folder,
    compile_library,
    verdict,
    write_verdict,
)
from llmctl.kernels.compiled_step import is_disabled, load_library, load_packaged, make_native
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
"""Maximum relative error of the logits (2-norm), by precision or precision/KV cache.

The compiled step keeps activations in float32, where torch rounds to bfloat16; an 8-bit key may round to either neighbor.
"""

BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "Gemma 3": {"activation": "gelu_tanh", "norm_position": "both", "qk_norm": True, "rope_thetas": (1e4, 1e6)},
    "GPT-NeoX": {"norm": "layernorm", "gated": False, "attention_bias": True, "mlp_bias": True}
    | {"parallel": "separate", "rotary_dim": 8, "activation": "gelu", "tie_embeddings": False},
    "OLMo 2": {"norm_position": "output", "qk_norm": True, "qk_norm_kind": "width"},
}
"""Blocks other than Llama's that are checked, in float32."""

N_TOKENS = 10


def prepare_library(say: Callable[[str], None]) -> None:
    """Check the package's library, or compile one, at the first use on a machine; `say` gets a line before that.

    Never fails: without a library, decoding uses torch.
    """
    if is_disabled() or verdict():
        return
    with suppress(OSError, AttributeError):
        packaged = load_packaged()
        if packaged is not None and not problem_of(packaged):
            write_verdict(PACKAGED)
            return
    try:
        find_compiler()
    except BuildError:
        return  # a compiler may be installed later
    try:
        check_folder()
    except LlmctlError as error:
        write_verdict(str(error), is_lasting=False)
        say(f"the decoding library is not compiled: {error}; LLMCTL_NATIVE=0 leaves it out")
        return
    say("compiling the decoding library for this processor (once, a few seconds); LLMCTL_NATIVE=0 leaves it out")
    try:
        compile_and_check()
    except LlmctlError as error:
        write_verdict(str(error), is_lasting=not isinstance(error, OutputError))
        say(f"not compiled: {error}")


def compile_and_check() -> Path:
    """Compile the library, check it, and return its file; one that fails the check is removed.

    Raises: MissingCompilerError; LlmctlError with the reason.
    """
    path = compile_library()
    try:
        problem = problem_of(load_library(path))
    except (OSError, AttributeError) as error:
        problem = str(error)
    if problem:
        path.unlink(missing_ok=True)
        raise LlmctlError(f"the compiled decoding library was removed: {problem}", "generation works without it")
    write_verdict(COMPILED)
    return path


def problem_of(library: Library) -> str:
    """Return what is wrong with a library on this machine; empty if nothing is."""
    errors = errors_of(library)
    wrong = [f"{name} by {error:.2g}" for name, error in errors.items() if not error < LARGEST_ERRORS[name]]
    others = {name: error_of(library, "fp32", **fields) for name, fields in BLOCKS.items()}
    wrong += [f"{name} by {error:.2g}" for name, error in others.items() if not error < LARGEST_ERRORS["fp32"]]
    return f"its logits are wrong ({', '.join(wrong)})" if wrong else ""


def errors_of(library: Library) -> dict[str, float]:
    """Return the relative error of the compiled step for every case in `LARGEST_ERRORS`."""
    return {case: max(error_of(library, case, group) for group in groups_of(case)) for case in LARGEST_ERRORS}


def groups_of(case: str) -> tuple[int, ...]:
    """Return the group sizes to check for a case; (0,) if its scheme has no groups."""
    return GROUPS if case in SCHEMES and SCHEMES[case].group else (0,)


@torch.inference_mode()
def error_of(library: Library, case: str, group: int = 0, **fields: Any) -> float:
    """Return the largest relative error of the logits of a small model; case: a key of `LARGEST_ERRORS`; group 0: the scheme's."""
    precision, _, kv = case.partition("/")
    decoder = Decoder(random_model(replace(SHAPE, **fields), precision, group=group))
    step = make_native(library, decoder)
    if step is None:
        return float("inf")
    dtype = next(decoder.model.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(0, SHAPE.vocab_size, (3, 7), generator=generator)
    caches = [CACHES[kv or "float"](decoder.config, 3, 7 + N_TOKENS, dtype=dtype) for _ in range(2)]
    step.reads = True  # also with weights that are not quantized, which torch is faster with
    expected_BV = decoder.model.head(decoder.hidden(prompt_BT, caches[0])[:, -1]).float()
    read_BV = step.read(prompt_BT, caches[1], None, is_last=True)
    assert read_BV is not None
    errors = [(read_BV - expected_BV).norm() / expected_BV.norm()]
    for _ in range(N_TOKENS):
        tokens_B = torch.randint(0, SHAPE.vocab_size, (3,), generator=generator)
        expected_BV, compiled_BV = decoder.logits(tokens_B, caches[0]).float(), step(tokens_B, caches[1], None)
        assert compiled_BV is not None
        errors.append((compiled_BV - expected_BV).norm() / expected_BV.norm())
    return float(torch.stack(errors).max().nan_to_num(float("inf")))  # Python's `max` overlooks a NaN
