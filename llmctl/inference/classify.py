"""Classify texts with a classification head: labels with probabilities, or numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmctl.artifacts.load import Loaded
from llmctl.inference.encoding import encode_rows, longest_row
from llmctl.inference.rows import row_outputs
from llmctl.inference.sampling import require_finite

THRESHOLD = 0.5
"""Probability above which a label is chosen if a text can have several."""


@dataclass(frozen=True)
class Classified:
    """The result for one text: labels with probabilities, most likely first, or the values of a regression.

    chosen: the most likely label, or all above THRESHOLD for multi-label models; empty for regression.
    """

    texts: tuple[str, ...]
    probabilities: dict[str, float]
    chosen: tuple[str, ...]
    values: tuple[float, ...] = ()
    n_cut: int = 0


def classify(loaded: Loaded, texts: Sequence[tuple[str, ...]], *, batch_size: int = 32) -> list[Classified]:
    """Classify texts or pairs of texts; a result depends on the rest of its batch only by rounding."""
    config = loaded.model.config
    rows = encode_rows(loaded, texts, longest_row(loaded))
    outputs_NL = row_outputs(loaded, rows, batch_size)
    require_finite(outputs_NL.amax(dim=1))
    names = config.labels or tuple(str(number) for number in range(config.n_labels))
    results = []
    for parts, row, outputs_L in zip(texts, rows, outputs_NL, strict=True):
        if config.problem == "regression":
            results.append(Classified(parts, {}, (), tuple(outputs_L.tolist()), row.n_cut))
            continue
        shares = (outputs_L.sigmoid() if config.problem == "multi" else outputs_L.softmax(dim=0)).tolist()
        ranked = sorted(zip(names, shares, strict=True), key=lambda pair: -pair[1])
        chosen = [name for name, share in ranked if share > THRESHOLD]
        if config.problem == "single":
            chosen = [ranked[0][0]]
        results.append(Classified(parts, dict(ranked), tuple(chosen), (), row.n_cut))
    return results
