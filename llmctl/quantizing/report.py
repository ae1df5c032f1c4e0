"""Report of a quantization: the model before and after, on the same rows and on this machine."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmctl.benchmarking.speed import reading_speed, writing_speed
from llmctl.config import QuantizeConfig
from llmctl.formats.artifact import Artifact
from llmctl.formats.quantization import EXPONENT, PARTS, WEIGHT
from llmctl.kernels.decoder import decoding_by, make_decoder
from llmctl.kernels.product_table import Measured, give_table
from llmctl.machine import peak_memory_bytes
from llmctl.metrics.figures import FIGURES, rounded, shown
from llmctl.metrics.gate import parse_gate
from llmctl.model.decode import Decoder
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel
from llmctl.quant.schemes import Scheme
from llmctl.runs.comparison import ROWS, Report, row

READING, WRITING = "tokens_per_second_reading", "tokens_per_second_writing"


def make_report(
    models: Mapping[str, LanguageModel],
    measured: Mapping[str, Mapping[str, float]],
    *,
    batch: Mapping[str, Tensor],
    source: Artifact,
    result_bytes: int,
    result_layer_bits: float,
    lost: Mapping[str, float],
    settings: QuantizeConfig,
    metric: str,
    device: torch.device,
    is_ours: bool = True,
) -> Report:
    """Return the report of a run; the models are `before` and `after`. is_ours: we run it, so that its speed is measured."""
    # With trained codes, the chosen ones are shown in between.
    sides: dict[str, dict[str, Any]] = {name: rounded(figures) for name, figures in measured.items()}
    decoder, writes = None, None  # of the model afterwards
    for name, model in models.items():
        sides[name] = {"bytes": stored_bytes(source) if name == "before" else result_bytes, **sides[name]}
        if not is_ours:
            continue
        own, decoder = speeds(model, batch)
        sides[name] |= own
        writes = own.get(WRITING)
    n_parameters = models["after"].n_parameters
    record: dict[str, Any] = {
        "metric": metric,
        "scheme": settings.weights.gguf or settings.weights.scheme,
        "method": settings.weights.method,
        "n_parameters": n_parameters,
        "bits_per_weight": 8 * sides["after"]["bytes"] / n_parameters,
        "bits_per_weight_layers": result_layer_bits,
        "models": sides,
        "lost": lost,
        "decoding": decoding_by(decoder) if writes is not None else None,
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    for name in ("reading", "writing"):
        key = f"tokens_per_second_{name}"
        if key in sides["after"] and key in sides["before"]:
            record[f"{name}_ratio"] = sides["after"][key] / sides["before"][key]
    return Report(record, missed(record, settings.max_drop))


def speeds(model: LanguageModel, batch: Mapping[str, Tensor]) -> tuple[dict[str, float], Decoder | None]:
    """Return the speeds of a model that is used, not trained: its decoder takes over the weights; and the decoder."""
    give_table(model, Measured())  # the matmul kernels that are used in generation
    decoder = make_decoder(model)
    writes = writing_speed(model, batch, decoder)
    found = {READING: reading_speed(model, batch)}
    return found | ({WRITING: writes} if writes is not None else {}), decoder


def stored_bytes(artifact: Artifact) -> int:
    """Return the size of a model's tensors on disk in bytes."""
    return sum(entry.end - entry.begin for _, _, entry in artifact.tensors.values())


def layer_bits(artifact: Artifact, schemes: Mapping[str, Scheme]) -> float:
    """Return the bits per weight of the matrices in the blocks, including scales and zero points."""
    shapes = parameter_shapes(artifact.config)
    inside = [name for name in schemes if "layers." in name]
    parts = [f"{name}.{part}" for name in inside for part in (WEIGHT, *PARTS, EXPONENT)]
    found = [artifact.tensors[part][2] for part in parts if part in artifact.tensors]
    weights = sum(math.prod(shapes[f"{name}.weight"]) for name in inside)
    return 8 * sum(entry.end - entry.begin for entry in found) / max(weights, 1)


def missed(record: Mapping[str, Any], gate: str) -> str:
    """Return which gate the model misses, or an empty string."""
    sides = record["models"]
    name = "perplexity" if record["metric"] in ("loss", "kl") and "perplexity" in sides["before"] else record["metric"]
    if not gate or name not in sides["before"]:
        return ""
    before, after = sides["before"][name], sides["after"][name]
    if parse_gate(gate).holds(name, before, after):
        return ""
    return f"{name}: {after:.6g} quantized against {before:.6g} before, a drop of more than {gate}"


def render(record: Mapping[str, Any]) -> list[str]:
    """Return the report as a table of at most 79 columns."""
    sides = record["models"]

    def line(label: str, key: str, form: str) -> str:
        return row(label, {name: shown(side.get(key), form, absent="") for name, side in sides.items()})

    lines = [row("", {name: name for name in sides})]
    sizes = {name: f"{side['bytes'] / 1e6:,.2f}" if "bytes" in side else "" for name, side in sides.items()}
    lines.append(row("MB", sizes))
    if "tokens_per_second_reading" in sides["after"]:
        lines.append(line("tokens/s reading", "tokens_per_second_reading", ",.0f"))
    if "tokens_per_second_writing" in sides["after"]:
        lines.append(line("tokens/s writing", "tokens_per_second_writing", ",.1f"))
    measured = [name for name in ROWS if any(name in side for side in sides.values())]
    lines += [line(FIGURES[name].label, name, FIGURES[name].form) for name in measured]
    facts = [
        f"{record['bits_per_weight']:.2f} bits per weight in total, {record['bits_per_weight_layers']:.2f} in the blocks",
        f"peak memory {record['peak_memory_bytes'] / 1e6:,.0f} MB",
    ]
    if record["decoding"]:
        facts.append(f"decoding: {record['decoding']}")
    slower = [name for name in ("reading", "writing") if record.get(f"{name}_ratio", 1.0) < 1.0]
    if slower:
        verb = "is" if len(slower) == 1 else "are"
        facts.append(f"{' and '.join(slower)} {verb} slower on this machine than before")
    return [*lines, *facts]
