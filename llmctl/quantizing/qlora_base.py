"""The base of an adapter, made out of a model in full precision: its blocks' linear maps in four bits, chosen without data.

An adapter makes up for the rounding that it was trained on, so it belongs to these codes and to no others: they are
written once, into the run's own folder, and the adapter names them there. Where we deviate from QLoRA: the codes are
whole numbers on the clipped range of every group of 64, with a zero of its own, not NF4, whose levels no kernel here
multiplies by; scales have 16 bits and are not quantized again; the optimizer's state is not paged.

Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314; with DoRA's lengths: Liu et al. 2024, arXiv:2402.09353.
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
"""The folder of the base inside that of the run."""

WEIGHTS = WeightsConfig(scheme="int4", scale_bits=16, method="clip", embedding="float")
"""As in the paper embedding and heads stay in 16 bits."""

BITS = SCHEMES[WEIGHTS.scheme].bits


def write_packed_base(given: Loaded, out: Path) -> dict[str, Any]:
    """Write a model in four bits, and return what it was made from; the weights of the one given become what it means.

    Raises: ArtifactError for weights that are no finite numbers; OutputError.
    """
    refuse_unfinite(given.model, str(given.artifact.path))
    plan = plan_of(given.model.config, QuantizeConfig(weights=WEIGHTS))
    found = calibrate(given.model, plan, WEIGHTS.method, [], lambda _: None)
    made = {"quantised_from": identity_of(given.artifact), "weights": WEIGHTS.scheme, "method": WEIGHTS.method}
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
