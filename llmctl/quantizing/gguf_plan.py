"""Formats of the matrices of a GGUF file: all the same, or allocated under a size by measured sensitivity."""

from collections.abc import Mapping

from llmctl.config import MIXED, ModelConfig
from llmctl.converting.export_gguf import Ready, other_bytes
from llmctl.errors import UsageError
from llmctl.formats.gguf.architectures import architecture_for
from llmctl.formats.gguf.model import tensor_names
from llmctl.formats.gguf.write import find_type, plan_blocks
from llmctl.model.parameters import parameter_shapes
from llmctl.quant.gguf_schemes import BLOCK_SCHEMES, BlockScheme
from llmctl.quant.methods import AnyScheme
from llmctl.quantizing.bit_allocation import Budget, parse_size

SMALLEST = "q2_K"
"""The type whose plan says which matrices are quantized where types are mixed."""


def find_gguf_type(name: str) -> str:
    """Return the type of this name, or `mixed`.

    Raises: UsageError for another, or one that is not quantized.
    """
    if name.lower() == MIXED:
        return MIXED
    kind = find_type(name, quantized=True)
    if kind in ("f32", "f16", "bf16"):
        raise UsageError(f"the GGUF type {kind} is not quantized", f"llmctl export --to gguf --type {kind}")
    return kind


def modules_of(config: ModelConfig) -> dict[str, str]:
    """Return llama.cpp's name -> module of every matrix that one tensor of a file holds alone or is the first part of."""
    names = tensor_names(config, architecture_for(config))
    return {there: own[0].removesuffix(".weight") for there, own in names.items() if there.endswith(".weight")}


def planned_blocks(config: ModelConfig, kind: str) -> dict[str, BlockScheme]:
    """Return the format of every module that is quantized."""
    names = tensor_names(config, architecture_for(config))
    return {
        own.removesuffix(".weight"): BLOCK_SCHEMES[block]
        for there, (block, _) in plan_blocks(config, SMALLEST if kind == MIXED else kind).items()
        for own in names[there]
        if block in BLOCK_SCHEMES
    }


def candidates(width: int) -> list[AnyScheme]:
    """Return the formats of rows of this width, the smallest first; none that is larger than another and no better."""
    fitting = [scheme for scheme in BLOCK_SCHEMES.values() if scheme.fits(width)]
    dropped = {"Q4_0"} | ({"IQ4_NL", "Q4_1", "Q5_0", "Q5_1"} if width % 256 == 0 else set())
    kept: list[AnyScheme] = [scheme for scheme in fitting if scheme.name not in dropped]
    return sorted(kept, key=lambda scheme: scheme.size_bits(1, width))


def budget_of(ready: Ready, plan: Mapping[str, AnyScheme], size: str) -> Budget:
    """Return the bits that a file of this size leaves for its matrices."""
    config = ready.artifact.config
    shapes = {name: parameter_shapes(config)[f"{name}.weight"] for name in plan}
    rest_bits = 8 * other_bytes(ready, set(plan))
    return Budget(
        {name: candidates(shape[1]) for name, shape in shapes.items()},
        shapes,
        8 * parse_size(size) - rest_bits,
        rest_bits,
    )
