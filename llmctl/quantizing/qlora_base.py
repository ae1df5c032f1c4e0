"""The 4-bit base of an adapter (qlora, qdora): the linear layers of the blocks, quantized without data.

An adapter compensates the rounding it was trained on, so it only fits these codes: they are written once, into the run
folder, and the adapter refers to them. Differences from QLoRA: integer codes over the clipped range of each group of 64 with
a zero point, not NF4, for which there is no kernel here; 16-bit scales without double quantization; no paged optimizer.

Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314; DoRA's magnitudes: Liu et al. 2024, arXiv:2402.09353.
"""

from pathlib import Path
from typing import Any

from llmctl.artifacts.load import Loaded
from llmctl.artifacts.with_adapters import identity_of
from llmctl.config import QuantizeConfig, WeightsConfig
from llmctl.formats.artifact_write import write_artifact
from llmctl.quant.schemes import SCHEMES
from llmctl.quantizing.calibrate import calibrate, refuse_unfinite
from llmctl.quantizing.packed_state import stored_state
from llmctl.quantizing.settings import plan_of

BASE = "base-int4"
"""The base's folder in the run folder."""

WEIGHTS = WeightsConfig(scheme="int4", scale_bits=16, method="clip", embedding="float")
"""Embedding and heads stay in 16 bits, as in the paper."""

BITS = SCHEMES[WEIGHTS.scheme].bits


def write_packed_base(given: Loaded, out: Path) -> dict[str, Any]:
    """Write a model in 4 bits and return its provenance; the given model's weights are replaced by the dequantized ones.

    Raises: ArtifactError for non-finite weights; OutputError.
    """
    refuse_unfinite(given.model, str(given.artifact.path))
    plan = plan_of(given.model.config, QuantizeConfig(weights=WEIGHTS))
    found = calibrate(given.model, plan, WEIGHTS.method, [], lambda _: None)
    made = {"quantized_from": identity_of(given.artifact), "weights": WEIGHTS.scheme, "method": WEIGHTS.method}
    write_artifact(
        out,
        given.model.config,
        stored_state(given.model, found, plan),
        files=given.artifact.files,
        provenance={**given.artifact.provenance, **made},
        schemes=plan,
        force=True,
    )
    return made
