"""Quantization methods. To add one: a row here and its function in quant/methods.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodRow:
    """How codes are chosen: the name of a function of (weight (O, I), scheme, input moments or None).

    needs_data: it uses statistics of a layer's inputs. equalizes: scales are first moved into the layer before. weighs: inputs
    are weighted by the Fisher information of the layer's outputs.
    """

    function: str
    summary: str
    source: str
    needs_data: bool = False
    equalizes: bool = False
    weighs: bool = False


METHODS: dict[str, MethodRow] = {
    "nearest": MethodRow("nearest", "round to nearest over the whole range", "Jacob et al. 2018, arXiv:1712.05877"),
    "clip": MethodRow(
        "clipped", "round to nearest over the clipped range of least squared error", "grid search over clipping ratios"
    ),
    "weighted": MethodRow(
        "weighted", "clipped range, errors weighted by the inputs' second moments", "llama.cpp imatrix", True
    ),
    "hqq": MethodRow("half_quadratic", "half-quadratic zero points, no data", "HQQ, Badri and Shaji 2023"),
    "awq": MethodRow(
        "weighted", "scales moved by activation magnitude", "AWQ, Lin et al. 2023, arXiv:2306.00978", True, True
    ),
    "gptq": MethodRow(
        "gptq", "second-order error correction by column", "GPTQ, Frantar et al. 2022, arXiv:2210.17323", True
    ),
    "awq-gptq": MethodRow("gptq", "awq, then gptq", "arXiv:2306.00978, arXiv:2210.17323", True, True),
    "guided": MethodRow(
        "guided",
        "gptq with Fisher-weighted errors, then alternating refits of scales and codes",
        "GuidedQuant, Kim et al. 2025, arXiv:2505.07004; QuantEase, Behdin et al. 2023, arXiv:2309.01885",
        True,
        weighs=True,
    ),
}

LEARNED = "learned"
"""Not a way to choose codes: it starts from those of `guided` and trains them through the loop."""
